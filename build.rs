//! Compiles proto/ with a pure-Rust protobuf compiler, so that a fresh machine needs no protoc.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

const PROTOS: &[&str] = &[
    "bb_remote_execution/control/control.proto",
    "bb_remote_execution/live_output/live_output.proto",
    "build/bazel/remote/execution/v2/remote_execution.proto",
    "build/bazel/semver/semver.proto",
    "google/bytestream/bytestream.proto",
    "google/longrunning/operations.proto",
    "google/rpc/code.proto",
    "google/rpc/error_details.proto",
    "google/rpc/status.proto",
    "opentelemetry/proto/collector/trace/v1/trace_service.proto",
    "opentelemetry/proto/common/v1/common.proto",
    "opentelemetry/proto/resource/v1/resource.proto",
    "opentelemetry/proto/trace/v1/trace.proto",
    "pkg/proto/auth/auth.proto",
    "pkg/proto/buildqueuestate/buildqueuestate.proto",
    "pkg/proto/cas/cas.proto",
    "pkg/proto/completedactionlogger/completed_action.proto",
    "pkg/proto/iscc/iscc.proto",
    "pkg/proto/remoteactionrouter/remoteactionrouter.proto",
    "pkg/proto/remoteworker/remoteworker.proto",
    "pkg/proto/resourceusage/resourceusage.proto",
    "pkg/proto/runner/runner.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // For server reflection, and for the test that compares field by field.
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    let mut config = prost_build::Config::new();
    // What travels in a google.protobuf.Any knows its own URL.
    config.enable_type_names();
    config.type_name_domain(["."], "type.googleapis.com");
    tonic_prost_build::configure()
        // Blobs are shared, not copied.
        .bytes(".")
        .codec_path("crate::codec::MessageCodec")
        // Maps have one order, so that two encodings of a message are equal.
        .btree_map(".")
        .include_file("proto.rs")
        .compile_fds_with_config(descriptors, config)?;
    Ok(())
}
