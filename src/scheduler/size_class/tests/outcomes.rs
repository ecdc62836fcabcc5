//! Comparisons of what executions came to.

use super::*;

fn outcomes(successes: &[u64], failures: usize) -> Outcomes {
    Outcomes::new(successes.iter().copied().map(seconds).collect(), failures)
}

#[test]
fn nothing_is_faster_than_itself() {
    for outcomes in [
        outcomes(&[], 0),
        outcomes(&[1], 0),
        outcomes(&[1, 1], 0),
        outcomes(&[7, 8, 9, 10, 11, 12], 14),
    ] {
        assert_eq!(outcomes.is_faster(&outcomes), 0.5);
    }
}

#[test]
fn shares_are_of_pairs_with_one_given_to_each_side() {
    for (ours, theirs, share) in [
        // What was tried less often is to be tried.
        (outcomes(&[1], 0), outcomes(&[], 0), 1.0 / 3.0),
        (outcomes(&[1; 10], 0), outcomes(&[], 10), 211.0 / 222.0),
        // One is spread wider.
        (
            outcomes(&[6, 8, 10, 10, 12, 14], 1),
            outcomes(&[9, 9, 9, 11, 11, 11], 1),
            0.5,
        ),
        (
            outcomes(&[1, 3, 5, 7, 9, 11], 0),
            outcomes(&[2, 4, 6, 8, 10, 12], 0),
            49.0 / 86.0,
        ),
        (
            outcomes(&[1, 3, 5, 7, 9, 11, 13], 0),
            outcomes(&[2, 4, 6, 8, 10, 12], 0),
            49.0 / 99.0,
        ),
    ] {
        assert_eq!(ours.is_faster(&theirs), share);
        assert!((theirs.is_faster(&ours) - (1.0 - share)).abs() < 1e-12);
    }
}

#[test]
fn the_median_is_of_successes() {
    assert_eq!(outcomes(&[], 3).median(), None);
    assert_eq!(outcomes(&[5, 1, 3], 3).median(), Some(seconds(3)));
    assert_eq!(
        outcomes(&[5, 1, 4, 3], 0).median(),
        Some(Duration::from_millis(3500))
    );
}
