"""Bazel's own C++ rules under the names that @rules_cc gives them.

Debian ships no @rules_cc that fits its Bazel, and the demo downloads nothing.
"""

# Bazel checks for this tag when --incompatible_load_cc_rules_from_bzl is set.
_TAG = "__CC_RULES_MIGRATION_DO_NOT_USE_WILL_BREAK__"

def _tagged(attributes):
    tags = attributes.pop("tags", None) or []
    return dict(attributes, tags = tags + [_TAG])

def cc_binary(**attributes):
    native.cc_binary(**_tagged(attributes))

def cc_library(**attributes):
    native.cc_library(**_tagged(attributes))

def cc_test(**attributes):
    native.cc_test(**_tagged(attributes))

def cc_import(**attributes):
    native.cc_import(**_tagged(attributes))

def cc_proto_library(**attributes):
    native.cc_proto_library(**_tagged(attributes))

def cc_toolchain(**attributes):
    native.cc_toolchain(**_tagged(attributes))

def cc_toolchain_suite(**attributes):
    native.cc_toolchain_suite(**_tagged(attributes))

def fdo_prefetch_hints(**attributes):
    native.fdo_prefetch_hints(**_tagged(attributes))

def fdo_profile(**attributes):
    native.fdo_profile(**_tagged(attributes))

def objc_import(**attributes):
    native.objc_import(**_tagged(attributes))

def objc_library(**attributes):
    native.objc_library(**_tagged(attributes))
