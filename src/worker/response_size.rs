//! What a worker reports of an action, made so small that whoever is told can receive it.

use prost::Message;

use crate::proto::{self, reapi, rpc};

/// gRPC's default for the largest message that is received, less an Operation or a
/// SynchronizeRequest around the response.
const MAXIMUM_SIZE: usize = (4 << 20) - (64 << 10);

/// Leaves the lists out of a response that nobody could receive, and says so in its status.
pub fn truncate(response: &mut reapi::ExecuteResponse) {
    let size = response.encoded_len();
    if size > MAXIMUM_SIZE {
        cut(
            response,
            rpc::Code::InvalidArgument,
            &format!(
                "the result takes {size} bytes, more than the {MAXIMUM_SIZE} that clients can receive"
            ),
        );
        if response.encoded_len() > MAXIMUM_SIZE
            && let Some(result) = &mut response.result
        {
            result.execution_metadata = None;
        }
    }
}

/// A result that a scheduler refused to take, because of what it is: without its lists first, then
/// the status alone.
pub fn after_refusal(response: &reapi::ExecuteResponse, reason: &str) -> reapi::ExecuteResponse {
    let text = format!(
        "the scheduler does not take the result, which takes {} bytes: {reason}; raise the size of messages that it receives from workers, or declare fewer outputs",
        response.encoded_len()
    );
    if is_cut(response) {
        return reapi::ExecuteResponse {
            status: Some(proto::status(rpc::Code::ResourceExhausted, text)),
            ..Default::default()
        };
    }
    let mut smaller = response.clone();
    cut(&mut smaller, rpc::Code::ResourceExhausted, &text);
    smaller
}

/// Keeps the exit code, the digests of stdout and stderr, the metadata; a status that is there
/// already stays, unless it is what takes so much.
fn cut(response: &mut reapi::ExecuteResponse, code: rpc::Code, text: &str) {
    if let Some(result) = &mut response.result {
        *result = reapi::ActionResult {
            exit_code: result.exit_code,
            stdout_digest: result.stdout_digest.take(),
            stderr_digest: result.stderr_digest.take(),
            execution_metadata: result.execution_metadata.take(),
            ..Default::default()
        };
    }
    response.server_logs.clear();
    let failed = |status: &rpc::Status| status.code != rpc::Code::Ok as i32;
    let keeps = |status: &rpc::Status| failed(status) && status.encoded_len() <= MAXIMUM_SIZE / 2;
    if !response.status.as_ref().is_some_and(keeps) {
        response.status = Some(proto::status(code, text));
    }
}

#[expect(deprecated, reason = "clients of REAPI 2.0 read the older lists")]
fn is_cut(response: &reapi::ExecuteResponse) -> bool {
    let Some(result) = &response.result else {
        return true;
    };
    response.server_logs.is_empty()
        && result.output_files.is_empty()
        && result.output_directories.is_empty()
        && result.output_symlinks.is_empty()
        && result.output_file_symlinks.is_empty()
        && result.output_directory_symlinks.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestFunction;

    fn response(outputs: usize) -> reapi::ExecuteResponse {
        let digest = DigestFunction::Sha256.digest_of(b"out").to_proto();
        let link = reapi::OutputSymlink {
            path: "p".to_owned(),
            target: "t".repeat(1000),
            ..Default::default()
        };
        reapi::ExecuteResponse {
            result: Some(reapi::ActionResult {
                exit_code: 3,
                stdout_digest: Some(digest),
                output_symlinks: vec![link; outputs],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn what_fits_stays_as_it_is_and_what_does_not_keeps_what_people_read() {
        let mut small = response(4000);
        truncate(&mut small);
        assert_eq!(small, response(4000));
        let mut large = response(4200);
        truncate(&mut large);
        assert!(large.encoded_len() < 1000);
        let result = large.result.unwrap();
        assert_eq!(result.exit_code, 3);
        assert!(result.stdout_digest.is_some());
        let status = large.status.unwrap();
        assert_eq!(status.code, rpc::Code::InvalidArgument as i32);
    }

    #[test]
    fn metadata_and_a_status_that_are_too_large_are_left_out() {
        let mut large = response(0);
        let metadata = reapi::ExecutedActionMetadata {
            worker: "w".repeat(5 << 20),
            ..Default::default()
        };
        large.result.as_mut().unwrap().execution_metadata = Some(metadata);
        large.status = Some(proto::status(rpc::Code::Internal, "x".repeat(5 << 20)));
        truncate(&mut large);
        assert!(large.encoded_len() < 1000);
        let status = large.status.unwrap();
        assert_eq!(status.code, rpc::Code::InvalidArgument as i32);
    }

    #[test]
    fn each_refusal_makes_a_report_smaller_until_only_the_status_is_left() {
        let first = after_refusal(&response(10), "too large");
        assert_eq!(first.result.as_ref().unwrap().exit_code, 3);
        assert_eq!(first.result.as_ref().unwrap().output_symlinks, []);
        let code = rpc::Code::ResourceExhausted as i32;
        assert_eq!(first.status.as_ref().unwrap().code, code);
        let second = after_refusal(&first, "too large");
        assert_eq!(second.result, None);
        assert_eq!(second.status.as_ref().unwrap().code, code);
    }
}
