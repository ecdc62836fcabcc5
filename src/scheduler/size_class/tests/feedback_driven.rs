//! With feedback.

use super::*;

#[test]
fn an_action_is_known_by_its_command_and_platform() {
    let action = reapi::Action {
        command_digest: Some(reapi::Digest {
            hash: "bf4d2b56ee892c3fc862cdb863a6c2f4".to_owned(),
            size_bytes: 720,
        }),
        input_root_digest: Some(reapi::Digest {
            hash: "9a0be105e682022830da33578b909521".to_owned(),
            size_bytes: 951,
        }),
        ..Default::default()
    };
    let hello = InstanceName::parse("hello").unwrap();
    let key = feedback_driven(None).statistics_key(&hello, DigestFunction::Md5, &action);
    let expected = Digest::parse_parts(
        Some(DigestFunction::Md5),
        "5057a5db1b97ee73b2466f60e781d607",
        39,
    );
    assert_eq!(
        key,
        Some(StatisticsKey {
            instance: hello,
            reduced_action: expected.unwrap(),
        })
    );
}

/// Nothing is known: the smallest one, for as long as is worth trying.
#[test]
fn what_is_abandoned_teaches_nothing() {
    let analyzer = feedback_driven(Some(page_rank(0.5)));
    let selection = selector(&analyzer, &Statistics::default()).select(CLASSES, random(0.1));
    assert_eq!(selection.index, 0);
    assert_eq!(selection.expected_duration, seconds(5));
    assert_eq!(selection.timeout, seconds(5));
    selection.learner.abandoned();
}

#[test]
fn a_success_is_remembered() {
    let analyzer = feedback_driven(None);
    let nothing = Statistics::default();
    let selection = selector(&analyzer, &nothing).select(CLASSES, random(0.4));
    assert_eq!(selection.index, 0);
    let completion = selection.learner.succeeded(MINUTE, CLASSES);
    assert!(completion.next.is_none());
    assert_eq!(
        updated(&nothing, completion.update),
        statistics(&[(1, &[success(60)])])
    );
}

#[test]
fn a_failure_on_a_smaller_class_counts_once_the_largest_succeeds() {
    for timed_out in [false, true] {
        let analyzer = feedback_driven(Some(page_rank(0.5)));
        let known = statistics(&[(1, &[success(10)]), (8, &[success(10)])]);
        let selection = selector(&analyzer, &known).select(CLASSES, 0);
        assert_eq!(selection.index, 0);
        let timeout = selection.timeout;
        let completion = selection.learner.failed(timed_out, CLASSES);
        assert_eq!(completion.update, None);
        let next = completion.next.unwrap();
        assert_eq!(next.index, 3);
        assert_eq!(next.expected_duration, seconds(10));
        assert_eq!(next.timeout, 30 * MINUTE);
        let completion = next.learner.succeeded(seconds(12), CLASSES);
        assert!(completion.next.is_none());
        let failure = if timed_out { TimedOut(timeout) } else { Failed };
        let after = updated(&known, completion.update);
        assert_eq!(after.executions(1), [success(10), failure]);
        assert_eq!(after.executions(8), [success(10), success(12)]);
    }
}

#[test]
fn a_failure_on_the_largest_is_final_and_skips_the_smaller_ones_for_a_day() {
    let analyzer = feedback_driven(Some(page_rank(0.5)));
    let known = statistics(&[(1, &[success(1)]), (8, &[success(10)])]);
    let selection = selector(&analyzer, &known).select(CLASSES, 0);
    let next = selection.learner.failed(false, CLASSES).next.unwrap();
    let completion = next.learner.failed(false, CLASSES);
    assert!(completion.next.is_none());
    let after = updated(&known, completion.update);
    // What the smaller class has to do with it is not known.
    assert_eq!(after.executions(1), [success(1)]);
    for (later, index) in [(0, 3), (86_400, 3), (86_401, 0)] {
        let statistics = Some((key(), Arc::new(after.clone())));
        let later = now() + seconds(later);
        let selection = analyzer
            .selector(30 * MINUTE, statistics, later)
            .select(CLASSES, 0);
        assert_eq!(selection.index, index);
        if index == 3 {
            assert_eq!(selection.expected_duration, seconds(10));
            assert_eq!(selection.timeout, 30 * MINUTE);
        }
    }
    // A failure that lies in the future is none.
    let statistics = Some((key(), Arc::new(after)));
    let earlier = now() - seconds(1);
    let selection = analyzer
        .selector(30 * MINUTE, statistics, earlier)
        .select(CLASSES, 0);
    assert_eq!(selection.index, 0);
}

#[test]
fn an_execution_in_the_background_follows_a_success_and_is_remembered() {
    let analyzer = feedback_driven(Some(PageRank {
        acceptable_execution_time_increase_exponent: 0.0,
        ..page_rank(0.0)
    }));
    let known = statistics(&[(1, &[Failed]), (8, &[success(40)])]);
    let selection = selector(&analyzer, &known).select(CLASSES, random(0.32));
    assert_eq!(selection.index, 3);
    assert_eq!(selection.expected_duration, seconds(40));
    assert_eq!(selection.timeout, 30 * MINUTE);
    let completion = selection.learner.succeeded(seconds(60), CLASSES);
    let known = updated(&known, completion.update);
    assert_eq!(known.executions(8), [success(40), success(60)]);
    // Of what is known now: 1.5 times the median of 50 s.
    let next = completion.next.unwrap();
    assert_eq!(next.index, 1);
    assert_eq!(next.timeout, seconds(75));
    assert_eq!(next.expected_duration, seconds(75));
    assert!(next.learner.is_background());
    let completion = next.learner.succeeded(seconds(72), CLASSES);
    assert!(completion.next.is_none());
    let known = updated(&known, completion.update);
    assert_eq!(known.executions(2), [success(72)]);
}

#[test]
fn a_failure_in_the_background_is_remembered_and_tried_no_more() {
    let analyzer = feedback_driven(Some(page_rank(0.5)));
    let known = statistics(&[(1, &[Failed]), (8, &[success(40)])]);
    for (timed_out, outcome) in [(false, Failed), (true, TimedOut(seconds(120)))] {
        let selection = selector(&analyzer, &known).select(CLASSES, 0);
        let next = selection.learner.succeeded(seconds(40), CLASSES).next;
        let completion = next.unwrap().learner.failed(timed_out, CLASSES);
        assert!(completion.next.is_none());
        let after = updated(&known, completion.update);
        assert_eq!(after.executions(2), [outcome]);
        assert!(!after.failed_within(MINUTE, now()));
    }
}

#[test]
fn there_is_no_background_execution_where_its_size_class_is_gone_or_the_largest_failed() {
    let analyzer = feedback_driven(Some(page_rank(0.5)));
    let known = statistics(&[(1, &[Failed]), (8, &[success(40)])]);
    let select = || selector(&analyzer, &known).select(CLASSES, 0);
    let completion = select().learner.succeeded(seconds(40), &[1, 4, 8]);
    assert!(completion.next.is_none() && completion.update.is_some());
    let completion = select().learner.failed(false, CLASSES);
    assert!(completion.next.is_none());
    assert!(updated(&known, completion.update).failed_within(MINUTE, now()));
}

#[test]
fn no_more_than_the_history_is_kept() {
    let mut known = Statistics::default();
    for duration in 0..9 {
        let selection = selector(&feedback_driven(None), &known).select(&[8], 0);
        let completion = selection.learner.succeeded(seconds(duration), &[8]);
        known = updated(&known, completion.update);
    }
    assert_eq!(known.executions(8), [4, 5, 6, 7, 8].map(success));
    // The median is what the next one is expected to take.
    let selection = selector(&feedback_driven(None), &known).select(&[8], 0);
    assert_eq!(selection.expected_duration, seconds(6));
}

#[test]
fn statistics_survive_their_encoding_and_what_others_cannot_have_written_is_said() {
    use prost::Message;
    let known = updated(
        &statistics(&[(0, &[Failed, success(7)]), (4, &[TimedOut(MINUTE)])]),
        Some(StatisticsUpdate {
            failed_on_largest: true,
            probabilities: Arc::new([(4, 0.25)]),
            ..StatisticsUpdate::new(key(), 5)
        }),
    );
    let encoded = known.to_proto().encode_to_vec();
    assert_eq!(Statistics::decode(&encoded).unwrap(), known);
    assert!(matches!(
        Statistics::decode(&encoded[..encoded.len() - 1]),
        Err(StatisticsError::Malformed(_))
    ));
    let mut newer = known.to_proto();
    newer
        .size_classes
        .get_mut(&4)
        .unwrap()
        .previous_executions
        .push(iscc::PreviousExecution { outcome: None });
    assert!(matches!(
        Statistics::from_proto(&newer),
        Err(StatisticsError::UnknownOutcome { size_class: 4 })
    ));
}
