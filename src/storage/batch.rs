//! Batches: many small blobs in one call, within limits of bytes and of blobs.

use std::collections::HashSet;

use crate::digest::{Digest, DigestFunction};

/// Batches of at most `bytes` together and `count` items each, in the order given. One item that is
/// larger is a batch of its own.
pub fn split<T>(items: Vec<T>, bytes: u64, count: usize, size: impl Fn(&T) -> u64) -> Vec<Vec<T>> {
    let mut batches: Vec<Vec<T>> = Vec::new();
    let mut left = 0;
    for item in items {
        let size = size(&item);
        match batches.last_mut() {
            Some(last) if size <= left && last.len() < count => {
                left -= size;
                last.push(item);
            }
            _ => {
                left = bytes.saturating_sub(size);
                batches.push(vec![item]);
            }
        }
    }
    batches
}

/// The items of each digest function, in the order given. A call has blobs of one (REAPI:
/// BatchReadBlobsRequest.digest_function).
pub(super) fn by_function<T>(items: Vec<T>, digest: impl Fn(&T) -> &Digest) -> Vec<Vec<T>> {
    let mut groups: Vec<(DigestFunction, Vec<T>)> = Vec::new();
    for item in items {
        let function = digest(&item).function();
        match groups.iter_mut().find(|(of, _)| *of == function) {
            Some((_, group)) => group.push(item),
            None => groups.push((function, vec![item])),
        }
    }
    groups.into_iter().map(|(_, group)| group).collect()
}

/// Two batches of about the same size, neither of them empty.
pub fn halve<T>(mut items: Vec<T>, size: impl Fn(&T) -> u64) -> [Vec<T>; 2] {
    let total: u64 = items.iter().map(&size).sum();
    let mut before = 0;
    let middle = items.iter().position(|item| {
        before += size(item);
        before > total / 2
    });
    let most = items.len().saturating_sub(1).max(1);
    let later = items.split_off(middle.unwrap_or(most).clamp(1, most));
    [items, later]
}

/// What FindMissing is to ask for: each digest once, in the order given, and none of an empty blob, which
/// is always there.
pub(super) fn distinct(digests: &[Digest]) -> Vec<Digest> {
    let mut seen = HashSet::with_capacity(digests.len());
    let wanted = digests
        .iter()
        .filter(|digest| !digest.is_empty_blob() && seen.insert(**digest));
    wanted.copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blobs_of_one_function_are_together_in_the_order_given() {
        let blobs = [
            DigestFunction::Sha256.digest_of(b"a"),
            DigestFunction::Md5.digest_of(b"b"),
            DigestFunction::Sha256.digest_of(b"c"),
        ];
        let groups = by_function(blobs.to_vec(), |digest| digest);
        assert_eq!(groups, [vec![blobs[0], blobs[2]], vec![blobs[1]]]);
    }

    #[test]
    fn batches_keep_their_limits_and_the_order() {
        let size = |item: &u64| *item;
        let batches = split(vec![1, 2, 3, 9, 1, 1, 1, 1], 5, 3, size);
        let expected: [&[u64]; 5] = [&[1, 2], &[3], &[9], &[1, 1, 1], &[1]];
        assert_eq!(batches, expected);
    }

    #[test]
    fn halves_are_never_empty() {
        let size = |item: &u64| *item;
        assert_eq!(halve(vec![9, 1], size), [vec![9], vec![1]]);
        assert_eq!(halve(vec![1, 9], size), [vec![1], vec![9]]);
        assert_eq!(halve(vec![1, 1, 1, 1], size), [vec![1, 1], vec![1, 1]]);
        assert_eq!(halve(vec![0, 0, 0], size), [vec![0, 0], vec![0]]);
    }
}
