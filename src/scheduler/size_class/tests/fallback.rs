//! Without feedback.

use super::*;

fn select(size_classes: &[u32]) -> Selection {
    let selector = Analyzer::Fallback.selector(seconds(300), None, now());
    selector.select(size_classes, 0)
}

#[test]
fn nothing_is_read() {
    let action = reapi::Action::default();
    let key =
        Analyzer::Fallback.statistics_key(&InstanceName::empty(), DigestFunction::Sha256, &action);
    assert_eq!(key, None);
}

#[test]
fn a_failure_on_the_only_size_class_is_final() {
    let selection = select(&[4]);
    assert_eq!(selection.index, 0);
    assert_eq!(selection.expected_duration, seconds(300));
    assert_eq!(selection.timeout, seconds(300));
    let completion = selection.learner.failed(true, &[4]);
    assert!(completion.next.is_none() && completion.update.is_none());
}

#[test]
fn a_failure_on_the_smallest_is_tried_once_more_on_the_largest() {
    let selection = select(CLASSES);
    assert_eq!(selection.index, 0);
    assert_eq!(selection.timeout, seconds(300));
    let next = selection.learner.failed(true, CLASSES).next.unwrap();
    assert_eq!(next.index, 3);
    assert_eq!(next.expected_duration, seconds(300));
    assert_eq!(next.timeout, seconds(300));
    assert!(!next.learner.is_background());
    let completion = next.learner.failed(false, CLASSES);
    assert!(completion.next.is_none() && completion.update.is_none());
}

#[test]
fn a_success_on_the_smallest_is_final() {
    let selection = select(CLASSES);
    let completion = selection.learner.succeeded(seconds(100), CLASSES);
    assert!(completion.next.is_none() && completion.update.is_none());
}

#[test]
fn the_largest_is_the_one_that_there_is_when_the_first_execution_fails() {
    let next = select(&[1, 2]).learner.failed(false, CLASSES).next;
    assert_eq!(next.unwrap().index, 3);
    let next = select(CLASSES).learner.failed(false, &[1]).next;
    assert_eq!(next.unwrap().index, 0);
}
