#!/usr/bin/env python3
"""Writes the protobuf descriptors that a Python wheel carries as one FileDescriptorSet.

usage: descriptors.py WHEEL OUTPUT

The generated modules hold each file's FileDescriptorProto as a bytes literal, which is taken as it
is: no protobuf library has a hand in it.
"""
import ast
import sys
import zipfile


def serialized_files(source):
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "AddSerializedFile"
        ):
            yield ast.literal_eval(node.args[0])


def varint(number):
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    wheel, output = sys.argv[1:]
    count = 0
    with zipfile.ZipFile(wheel) as archive, open(output, "wb") as out:
        for name in sorted(archive.namelist()):
            if name.endswith("_pb2.py"):
                for file in serialized_files(archive.read(name)):
                    # FileDescriptorSet.file is field 1, length-delimited.
                    out.write(b"\x0a" + varint(len(file)) + file)
                    count += 1
    if count == 0:
        sys.exit(f"{wheel} carries no descriptors")
    print(f"{count} descriptors in {output}")


main()
