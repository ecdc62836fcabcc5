//! Walking through a protobuf message without decoding it (Protocol Buffers: Encoding).
//!
//! A Tree of a million entries is read once, as bytes; of these, only what a page shows is decoded.

use bytes::{Buf, Bytes};
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

/// The length-delimited fields of a message, in their order; other ones are left out. Ends with an error
/// where the message is none.
pub(super) struct Fields(Bytes);

impl Fields {
    pub(super) fn of(message: Bytes) -> Self {
        Fields(message)
    }

    fn read(&mut self) -> Result<Option<(u32, Bytes)>, String> {
        while self.0.has_remaining() {
            let (number, kind) = decode_key(&mut self.0).map_err(|error| error.to_string())?;
            if kind == WireType::LengthDelimited {
                let length = decode_varint(&mut self.0).map_err(|error| error.to_string())?;
                let length = usize::try_from(length).map_err(|error| error.to_string())?;
                if length > self.0.remaining() {
                    return Err(format!("field {number} is longer than the message"));
                }
                return Ok(Some((number, self.0.split_to(length))));
            }
            skip_field(kind, number, &mut self.0, DecodeContext::default())
                .map_err(|error| error.to_string())?;
        }
        Ok(None)
    }
}

impl Iterator for Fields {
    type Item = Result<(u32, Bytes), String>;

    fn next(&mut self) -> Option<Self::Item> {
        let read = self.read().transpose();
        if matches!(read, Some(Err(_))) {
            self.0.clear();
        }
        read
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::proto::reapi::{Directory, DirectoryNode, FileNode};

    #[test]
    fn the_fields_of_a_message_are_found_and_what_is_none_ends_with_an_error() {
        let directory = Directory {
            files: vec![
                FileNode {
                    name: "a".to_owned(),
                    ..Default::default()
                };
                3
            ],
            directories: vec![DirectoryNode {
                name: "b".to_owned(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let data = Bytes::from(directory.encode_to_vec());
        let numbers: Result<Vec<u32>, String> = Fields::of(data.clone())
            .map(|field| field.map(|(number, _)| number))
            .collect();
        assert_eq!(numbers, Ok(vec![1, 1, 1, 2]));
        let mut cut = data.to_vec();
        cut.truncate(data.len() - 1);
        assert!(Fields::of(cut.into()).any(|field| field.is_err()));
        assert!(
            Fields::of(vec![0xff; 20].into())
                .take(100)
                .any(|field| field.is_err())
        );
    }
}
