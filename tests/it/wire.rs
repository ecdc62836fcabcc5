//! Our .proto files say what everybody else's say.
//!
//! The REAPI part is held against descriptors that others compiled from the published files
//! (`tests/run` fetches them); Buildbarn's part against bytes that were encoded by hand from the
//! published field numbers.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use bb_remote_execution::proto::{
    DESCRIPTORS, auth, buildqueuestate, cas, completedactionlogger, iscc, pack, reapi,
    remoteworker, resourceusage, rpc, runner, unpack,
};
use prost::Message;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    ServiceDescriptorProto,
};

/// What both sides must agree on.
const COMPARED: &[&str] = &[
    "build.bazel.remote.execution.v2",
    "build.bazel.semver",
    "google.bytestream",
    "google.longrunning",
    "google.rpc",
];

/// What only we have, since the oracle's files are of an earlier version, or what we leave out,
/// since nobody sends it to a build farm.
const OURS_ALONE: &[&str] = &[
    "google.longrunning.Operations.WaitOperation",
    "google.longrunning.WaitOperationRequest.name",
    "google.longrunning.WaitOperationRequest.timeout",
];
const THEIRS_ALONE: &[&str] = &[];

/// Every name in a set of descriptors, with all that matters on the wire.
fn facts(set: &FileDescriptorSet) -> BTreeMap<String, String> {
    let mut facts = BTreeMap::new();
    for file in &set.file {
        let package = file.package();
        if !COMPARED.contains(&package) {
            continue;
        }
        for message in &file.message_type {
            message_facts(package, message, &mut facts);
        }
        for values in &file.enum_type {
            enum_facts(package, values, &mut facts);
        }
        for service in &file.service {
            service_facts(package, service, &mut facts);
        }
    }
    facts
}

fn message_facts(scope: &str, message: &DescriptorProto, facts: &mut BTreeMap<String, String>) {
    let scope = format!("{scope}.{}", message.name());
    for field in &message.field {
        let oneof = (field.oneof_index.is_some() && !field.proto3_optional()).then(|| {
            message.oneof_decl[field.oneof_index() as usize]
                .name()
                .to_owned()
        });
        facts.insert(
            format!("{scope}.{}", field.name()),
            field_facts(field, oneof),
        );
    }
    for nested in &message.nested_type {
        message_facts(&scope, nested, facts);
    }
    for values in &message.enum_type {
        enum_facts(&scope, values, facts);
    }
}

fn field_facts(field: &FieldDescriptorProto, oneof: Option<String>) -> String {
    format!(
        "number {} {:?} {:?} {} packed {:?} oneof {oneof:?}",
        field.number(),
        field.label(),
        field.r#type(),
        field.type_name(),
        field.options.as_ref().and_then(|options| options.packed),
    )
}

fn enum_facts(scope: &str, values: &EnumDescriptorProto, facts: &mut BTreeMap<String, String>) {
    for value in &values.value {
        facts.insert(
            format!("{scope}.{}.{}", values.name(), value.name()),
            format!("= {}", value.number()),
        );
    }
}

fn service_facts(
    scope: &str,
    service: &ServiceDescriptorProto,
    facts: &mut BTreeMap<String, String>,
) {
    for method in &service.method {
        facts.insert(
            format!("{scope}.{}.{}", service.name(), method.name()),
            format!(
                "{} {} -> {} {}",
                method.client_streaming(),
                method.input_type(),
                method.server_streaming(),
                method.output_type()
            ),
        );
    }
}

fn bytes(hexadecimal: &str) -> Vec<u8> {
    let digits: Vec<u8> = hexadecimal
        .bytes()
        .filter(|byte| byte.is_ascii_hexdigit())
        .collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

fn golden<M: Message + Default + PartialEq + std::fmt::Debug>(message: M, hexadecimal: &str) {
    assert_eq!(M::decode(&*bytes(hexadecimal)).unwrap(), message);
    assert_eq!(message.encode_to_vec(), bytes(hexadecimal), "{message:?}");
}

fn digest() -> reapi::Digest {
    reapi::Digest {
        hash: "ab".to_owned(),
        size_bytes: 5,
    }
}

/// Field 1, "ab"; field 2, 5.
const DIGEST: &str = "0a 02 6162 10 05";

#[test]
fn the_worker_protocol_is_as_published() {
    use remoteworker::{current_state, desired_state};
    golden(
        remoteworker::SynchronizeRequest {
            worker_id: BTreeMap::from([("k".to_owned(), "v".to_owned())]),
            instance_name_prefix: "i".to_owned(),
            platform: Some(reapi::Platform {
                properties: vec![reapi::platform::Property {
                    name: "n".to_owned(),
                    value: "w".to_owned(),
                }],
            }),
            current_state: Some(remoteworker::CurrentState {
                worker_state: Some(current_state::WorkerState::Executing(
                    current_state::Executing {
                        action_digest: Some(digest()),
                        execution_state: Some(
                            current_state::executing::ExecutionState::Running(()),
                        ),
                    },
                )),
            }),
            size_class: 7,
            prefer_being_idle: true,
        },
        &format!(
            "0a 06 0a016b 120176  12 01 69  1a 08 0a06 0a016e 120177 \
             22 0c 120a 0a06 {DIGEST} 2200  28 07  30 01"
        ),
    );
    for (state, tag) in [
        (current_state::executing::ExecutionState::Started(()), "12"),
        (
            current_state::executing::ExecutionState::FetchingInputs(()),
            "1a",
        ),
        (
            current_state::executing::ExecutionState::UploadingOutputs(()),
            "2a",
        ),
        (
            current_state::executing::ExecutionState::Completed(reapi::ExecuteResponse::default()),
            "32",
        ),
    ] {
        golden(
            current_state::Executing {
                action_digest: None,
                execution_state: Some(state),
            },
            &format!("{tag} 00"),
        );
    }
    golden(
        remoteworker::SynchronizeResponse {
            next_synchronization_at: Some(prost_types::Timestamp {
                seconds: 3,
                nanos: 4,
            }),
            desired_state: Some(remoteworker::DesiredState {
                worker_state: Some(desired_state::WorkerState::Executing(
                    desired_state::Executing {
                        action_digest: Some(digest()),
                        action: Some(reapi::Action {
                            do_not_cache: true,
                            ..Default::default()
                        }),
                        queued_timestamp: Some(prost_types::Timestamp {
                            seconds: 1,
                            nanos: 0,
                        }),
                        auxiliary_metadata: vec![prost_types::Any {
                            type_url: "t".to_owned(),
                            value: Default::default(),
                        }],
                        instance_name_suffix: "s".to_owned(),
                        w3c_trace_context: BTreeMap::from([("k".to_owned(), "v".to_owned())]),
                        digest_function: reapi::digest_function::Value::Sha256 as i32,
                    },
                )),
            }),
        },
        &format!(
            "0a 04 0803 1004  12 24 12 22 0a06 {DIGEST} 1202 3801 2202 0801 \
             3203 0a0174 3a01 73 4206 0a016b 120176 4801"
        ),
    );
    golden(
        remoteworker::DesiredState {
            worker_state: Some(desired_state::WorkerState::Idle(())),
        },
        "0a 00",
    );
}

#[test]
fn the_runner_protocol_is_as_published() {
    golden(
        runner::RunRequest {
            arguments: vec!["a".to_owned(), "b".to_owned()],
            environment_variables: BTreeMap::from([("k".to_owned(), "v".to_owned())]),
            working_directory: "c".to_owned(),
            stdout_path: "d".to_owned(),
            stderr_path: "e".to_owned(),
            input_root_directory: "f".to_owned(),
            temporary_directory: "g".to_owned(),
            server_logs_directory: "h".to_owned(),
        },
        "0a0161 0a0162 1206 0a016b 120176 1a0163 220164 2a0165 320166 3a0167 420168",
    );
    golden(
        runner::RunResponse {
            exit_code: -1,
            resource_usage: vec![prost_types::Any {
                type_url: "t".to_owned(),
                value: Default::default(),
            }],
        },
        "08 ffffffffffffffffff01 1203 0a0174",
    );
    golden(
        runner::CheckReadinessRequest {
            path: "p".to_owned(),
        },
        "0a0170",
    );
}

#[test]
fn what_is_stored_and_logged_is_as_published() {
    golden(
        resourceusage::PosixResourceUsage {
            user_time: Some(prost_types::Duration {
                seconds: 1,
                nanos: 0,
            }),
            system_time: Some(prost_types::Duration {
                seconds: 2,
                nanos: 0,
            }),
            maximum_resident_set_size: 3,
            page_reclaims: 7,
            page_faults: 8,
            swaps: 9,
            block_input_operations: 10,
            block_output_operations: 11,
            messages_sent: 12,
            messages_received: 13,
            signals_received: 14,
            voluntary_context_switches: 15,
            involuntary_context_switches: 16,
            termination_signal: "KILL".to_owned(),
        },
        "0a02 0801 1202 0802 1803 3807 4008 4809 500a 580b 600c 680d 700e 780f 8001 10 \
         8a01 04 4b494c4c",
    );
    let historical = cas::HistoricalExecuteResponse {
        action_digest: Some(digest()),
        execute_response: Some(reapi::ExecuteResponse {
            cached_result: true,
            ..Default::default()
        }),
    };
    golden(historical.clone(), &format!("0a06 {DIGEST} 1a02 1001"));
    use iscc::previous_execution::Outcome;
    let execution = |outcome| iscc::PreviousExecution {
        outcome: Some(outcome),
    };
    let duration = |seconds| prost_types::Duration { seconds, nanos: 0 };
    let statistics = iscc::PreviousExecutionStats {
        size_classes: BTreeMap::from([(
            7,
            iscc::PerSizeClassStats {
                previous_executions: vec![
                    execution(Outcome::Failed(())),
                    execution(Outcome::TimedOut(duration(1))),
                    execution(Outcome::Succeeded(duration(2))),
                ],
                initial_page_rank_probability: 1.0,
            },
        )]),
        last_seen_failure: Some(prost_types::Timestamp {
            seconds: 3,
            nanos: 0,
        }),
    };
    let encoded = "0a1d 0807 1219 0a020a00 0a0412020801 0a041a020802 19 000000000000f03f \
                   1202 0803";
    golden(statistics.clone(), encoded);
    golden(
        iscc::GetPreviousExecutionStatsRequest {
            instance_name: "i".to_owned(),
            reduced_action_digest: Some(digest()),
            digest_function: reapi::digest_function::Value::Blake3 as i32,
        },
        &format!("0a0169 1206 {DIGEST} 1809"),
    );
    golden(
        iscc::UpdatePreviousExecutionStatsRequest {
            instance_name: "i".to_owned(),
            reduced_action_digest: Some(digest()),
            previous_execution_stats: Some(statistics),
            digest_function: reapi::digest_function::Value::Blake3 as i32,
        },
        &format!("0a0169 1206 {DIGEST} 1a23 {encoded} 2009"),
    );
    golden(
        completedactionlogger::CompletedAction {
            historical_execute_response: Some(historical),
            uuid: "u".to_owned(),
            instance_name: "i".to_owned(),
            digest_function: reapi::digest_function::Value::Blake3 as i32,
        },
        &format!("0a0c 0a06 {DIGEST} 1a02 1001 120175 1a0169 2009"),
    );
    golden(
        auth::AuthenticationMetadata {
            public: Some(prost_types::Value {
                kind: Some(prost_types::value::Kind::BoolValue(true)),
            }),
            tracing_attributes: Vec::new(),
            private: Some(prost_types::Value {
                kind: Some(prost_types::value::Kind::StringValue("s".to_owned())),
            }),
        },
        "0a02 2001 1a03 1a0173",
    );
}

#[test]
fn the_queue_state_is_as_published() {
    use buildqueuestate::operation_state::Stage;
    golden(
        buildqueuestate::OperationState {
            name: "n".to_owned(),
            queued_timestamp: Some(prost_types::Timestamp {
                seconds: 1,
                nanos: 0,
            }),
            action_digest: Some(digest()),
            timeout: Some(prost_types::Timestamp {
                seconds: 2,
                nanos: 0,
            }),
            stage: Some(Stage::Executing(())),
            target_id: "t".to_owned(),
            priority: -1,
            instance_name_suffix: "s".to_owned(),
            ..Default::default()
        },
        &format!(
            "0a016e 2202 0801 2a06 {DIGEST} 3a02 0802 4a00 5a0174 60 ffffffffffffffffff01 6a0173"
        ),
    );
    golden(
        buildqueuestate::KillOperationsRequest {
            filter: Some(buildqueuestate::kill_operations_request::Filter {
                r#type: Some(
                    buildqueuestate::kill_operations_request::filter::Type::OperationName(
                        "o".to_owned(),
                    ),
                ),
            }),
            status: Some(rpc::Status {
                code: rpc::Code::Aborted as i32,
                ..Default::default()
            }),
        },
        "0a03 0a016f 1202 080a",
    );
}

#[test]
fn what_travels_in_an_any_knows_its_name() {
    let usage = resourceusage::PosixResourceUsage {
        swaps: 9,
        ..Default::default()
    };
    let any = pack(&usage);
    assert_eq!(
        any.type_url,
        "type.googleapis.com/buildbarn.resourceusage.POSIXResourceUsage"
    );
    assert_eq!(unpack(&any), Some(usage));
    assert_eq!(unpack::<cas::HistoricalExecuteResponse>(&any), None);
}

fn ours() -> FileDescriptorSet {
    FileDescriptorSet::decode(DESCRIPTORS).unwrap()
}

#[test]
fn the_reapi_part_agrees_with_descriptors_that_others_compiled() {
    let Some(paths) = std::env::var_os("BB_DESCRIPTORS") else {
        crate::harness::skip("tests/run fetches the descriptors to compare with");
        return;
    };
    let ours = facts(&ours());
    let mut compared = BTreeSet::new();
    for path in std::env::split_paths(&paths) {
        let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let theirs = facts(&FileDescriptorSet::decode(&*bytes).unwrap());
        let mut differences = Vec::new();
        for (name, fact) in &theirs {
            match ours.get(name) {
                Some(same) if same == fact => {
                    compared.insert(name.clone());
                }
                Some(other) => differences.push(format!("{name}: ours {other}, theirs {fact}")),
                None if THEIRS_ALONE.contains(&name.as_str()) => {}
                None => differences.push(format!("{name}: only theirs, {fact}")),
            }
        }
        assert!(
            differences.is_empty(),
            "{}:\n{}",
            path.display(),
            differences.join("\n")
        );
    }
    let mut alone: BTreeSet<&str> = ours
        .keys()
        .filter(|name| !compared.contains(*name))
        .map(String::as_str)
        .collect();
    for name in OURS_ALONE {
        assert!(alone.remove(name), "{name} is not ours alone any more");
    }
    assert!(alone.is_empty(), "nobody else has {alone:#?}");
    assert!(
        compared.len() > 250,
        "only {} names compared",
        compared.len()
    );
}
