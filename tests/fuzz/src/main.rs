//! One program for all targets, by libFuzzer; FUZZ_TARGET says which. What is asked of each: no panic, no
//! overflow, memory and time within bounds, and the laws that are written below.

#![no_main]

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, LazyLock},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use bb_remote_execution::{
    config,
    digest::{Digest, DigestFunction},
    proto::reapi,
    resource::{ReadName, WriteName},
    scheduler::operation_name::ParsedName,
    storage::{
        chunking::{ChunkingFunction, Chunks},
        compression::{self, Decoder},
        embedded::{LimitId, Store},
    },
    worker::{
        command::Command,
        inputs::{directory_message::Directory, merkle_tree},
    },
};
use bytes::Bytes;
use libfuzzer_sys::{Corpus, fuzz_target};
use prost::Message;
use sha2::{Digest as _, Sha256};

const TARGETS: &[(&str, fn(&[u8]) -> Corpus)] = &[
    ("resource_names", resource_names),
    ("trees", trees),
    ("zstd", zstd),
    ("chunk_lists", chunk_lists),
    ("chunking", chunking),
    ("operation_names", operation_names),
    ("toml", toml),
];

static TARGET: LazyLock<fn(&[u8]) -> Corpus> = LazyLock::new(|| {
    let wanted = std::env::var("FUZZ_TARGET").unwrap_or_default();
    let found = TARGETS.iter().find(|(name, _)| *name == wanted);
    match found {
        Some((_, target)) => *target,
        None => {
            let names: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
            eprintln!("FUZZ_TARGET must be one of {}", names.join(", "));
            std::process::exit(2);
        }
    }
});

fuzz_target!(|data: &[u8]| -> Corpus { TARGET(data) });

/// A name that is taken is written in one way, and means the same then.
fn resource_names(data: &[u8]) -> Corpus {
    let Ok(name) = std::str::from_utf8(data) else {
        return Corpus::Reject;
    };
    if let Ok(read) = ReadName::parse(name) {
        let written = ReadName::format_as(&read.instance, &read.digest, read.compressor);
        assert_eq!(ReadName::parse(&written).ok(), Some(read));
    }
    if let Ok(write) = WriteName::parse(name) {
        let again = WriteName::parse(&write.uncompressed()).unwrap();
        assert_eq!(again.digest, write.digest);
        assert_eq!(again.instance, write.instance);
        assert_eq!(again.upload, write.upload);
    }
    Corpus::Keep
}

/// Directories of a Tree, as clients send them, put together to what an input root is laid out from; and
/// a Command.
fn trees(data: &[u8]) -> Corpus {
    let function = DigestFunction::Sha256;
    if let Ok(command) = reapi::Command::decode(data)
        && let Ok(command) = Command::parse(command)
    {
        command.outputs_overlap();
        command.output_parents();
    }
    let Ok(message) = reapi::Tree::decode(data) else {
        return Corpus::Reject;
    };
    let mut found = HashMap::new();
    let mut root = None;
    // Digests that nobody could make are made right, so that trees come about: an index into the list
    // takes the place of one whose size is small.
    let mut digests: Vec<Digest> = Vec::new();
    for mut directory in message.children.into_iter().chain(message.root) {
        for entry in &mut directory.directories {
            let index = entry.digest.as_ref().map_or(0, |digest| digest.size_bytes);
            if let Some(digest) = usize::try_from(index).ok().and_then(|i| digests.get(i)) {
                entry.digest = Some(digest.to_proto());
            }
        }
        let data = directory.encode_to_vec();
        let digest = function.digest_of(&data);
        if let Ok(directory) = Directory::parse(&digest, &data) {
            directory.weight();
            found.insert(digest, Arc::new(directory));
            digests.push(digest);
        }
        root = Some(digest);
    }
    if let Some(root) = root
        && let Ok((tree, _)) = merkle_tree::build(root, &found, &HashMap::new())
    {
        tree.files();
        if let Some(file) = tree.files().first() {
            assert!(tree.path_of(&file.digest).is_some());
        }
    }
    Corpus::Keep
}

/// A stream becomes no more than its blob, in whatever pieces it comes; what was compressed comes back.
fn zstd(data: &[u8]) -> Corpus {
    let Some((&[size, piece], stream)) = data.split_first_chunk::<2>() else {
        return Corpus::Reject;
    };
    let size = u64::from(size) * 1000;
    let mut decoder = Decoder::new(size).unwrap();
    let mut content = Vec::new();
    let mut decode = || {
        for piece in stream.chunks(usize::from(piece) + 1) {
            let mut input = Bytes::copy_from_slice(piece);
            while let Some(chunk) = decoder.decode(&mut input)? {
                content.extend_from_slice(&chunk);
            }
        }
        decoder.finish()
    };
    let in_pieces = decode().is_ok();
    assert!(content.len() as u64 <= size);
    let whole = compression::decode_whole(Bytes::copy_from_slice(stream), size);
    // Where libzstd has all of a frame at once it decodes it another way than where it comes in pieces. Of sizes that
    // frames announce, it compares those that it has whole with what there is, and not always the others; of blocks
    // that repeat a byte no times, in frames with a window of nothing, it takes the former and refuses the latter.
    // Whoever decompresses compares with the digest: what counts is that no way gives other bytes.
    if let Ok(whole) = whole {
        match in_pieces {
            true => assert_eq!(whole, content),
            false => assert!(whole.starts_with(&content)),
        }
    }
    let compressed = compression::encode_whole(stream).unwrap();
    let again = compression::decode_whole(compressed, stream.len() as u64);
    assert_eq!(again.unwrap(), stream);
    Corpus::Keep
}

static STORE: LazyLock<Store> = LazyLock::new(|| {
    let directory = scratch().join("store");
    let _ = std::fs::remove_dir_all(&directory);
    std::fs::create_dir_all(&directory).unwrap();
    let store = Store::open(&directory, 64 << 20).unwrap();
    let blobs: Vec<(Digest, Bytes)> = (0..8_usize)
        .map(|number| {
            let content = vec![number as u8; number * number * 100];
            (DigestFunction::Sha256.digest_of(&content), content.into())
        })
        .collect();
    for result in store.put(&blobs) {
        result.unwrap();
    }
    store
});

fn scratch() -> PathBuf {
    std::env::temp_dir().join(format!("bb-fuzz-{}", std::process::id()))
}

/// Whatever a list says, a blob that is spliced is what its digest says.
fn chunk_lists(data: &[u8]) -> Corpus {
    let Some((&kind, list)) = data.split_first() else {
        return Corpus::Reject;
    };
    let function = DigestFunction::Sha256;
    let mut chunks = Vec::new();
    let mut whole = Vec::new();
    for &entry in list.iter().take(64) {
        let number = usize::from(entry % 8);
        let content = vec![number as u8; number * number * 100];
        let digest = function.digest_of(&content);
        // Some lie about their size, or are not there.
        let size = match entry >> 6 {
            3 => digest.size() ^ u64::from(entry),
            _ => digest.size(),
        };
        chunks.push(match entry >> 6 {
            2 => function.digest_of(&[entry; 9]),
            _ => Digest::new(function, digest.hash_bytes(), size),
        });
        whole.extend(content);
    }
    if kind % 3 == 1 {
        whole.push(kind);
    }
    let mut blob = function.digest_of(&whole);
    if kind % 3 == 2 {
        let size = chunks.iter().map(Digest::size).sum();
        blob = Digest::new(function, blob.hash_bytes(), size);
    }
    let spliced = STORE.splice(blob, &chunks, LimitId::NONE);
    if spliced.is_ok() {
        let read = STORE.read(&blob, 1 << 30).unwrap();
        assert_eq!(function.digest_of(&read), blob);
    }
    Corpus::Keep
}

/// Chunks make up the blob, and have the sizes that their function says.
fn chunking(data: &[u8]) -> Corpus {
    let Some((&[a, b], blob)) = data.split_first_chunk::<2>() else {
        return Corpus::Reject;
    };
    let minimum = 64 + usize::from(a);
    let fast = a.is_multiple_of(2);
    let function = match fast {
        true => ChunkingFunction::FastCdc2020 {
            average: 1 << 10,
            seed: u32::from(b),
        },
        false => ChunkingFunction::RepMaxCdc {
            minimum,
            horizon: usize::from(b) * 8,
        },
    };
    let whole = Bytes::copy_from_slice(blob);
    let read = |start, end| Ok(whole.slice(start as usize..end as usize));
    let mut chunks = Chunks::new(function, blob.len() as u64, read);
    let mut at = 0;
    while let Some(chunk) = chunks.next_chunk().unwrap() {
        assert_eq!(chunk, &blob[at..at + chunk.len()]);
        at += chunk.len();
        match fast {
            true => assert!(chunk.len() <= 4 << 10),
            false => {
                assert!(chunk.len() < 2 * minimum);
                assert!(chunk.len() >= minimum || blob.len() < minimum);
            }
        }
    }
    assert_eq!(at, blob.len());
    Corpus::Keep
}

/// A name that is taken is written in one way, and means the same then.
fn operation_names(data: &[u8]) -> Corpus {
    let check = |name: &str| {
        if let Ok(ParsedName::Full(full)) = ParsedName::parse(name) {
            let again = ParsedName::parse(&full.to_string());
            assert!(matches!(again, Ok(ParsedName::Full(again)) if again == full));
        }
    };
    if let Ok(name) = std::str::from_utf8(data) {
        check(name);
    }
    // A content with the checksum that belongs to it.
    let operation = uuid::Uuid::nil();
    let mut hasher = Sha256::new();
    hasher.update(operation.as_bytes());
    hasher.update(data);
    let sum = hasher.finalize();
    let content = [data, &sum[..HASH_LENGTH]].concat();
    check(&format!(
        "{operation}.{VERSION}{}",
        URL_SAFE_NO_PAD.encode(content)
    ));
    Corpus::Keep
}

/// As in `operation_name`.
const HASH_LENGTH: usize = 4;
const VERSION: char = '1';

/// All three configurations: errors, no panic.
fn toml(data: &[u8]) -> Corpus {
    if std::str::from_utf8(data).is_err() {
        return Corpus::Reject;
    }
    static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
        let directory = scratch();
        std::fs::create_dir_all(&directory).unwrap();
        directory.join("daemon.toml")
    });
    std::fs::write(&*FILE, data).unwrap();
    let errors = [
        config::load::<config::scheduler::Config>(&FILE, false).err(),
        config::load::<config::worker::Config>(&FILE, false).err(),
        config::load::<config::runner::Config>(&FILE, false).err(),
    ];
    for error in errors.into_iter().flatten() {
        assert!(!error.to_string().is_empty());
    }
    Corpus::Keep
}
