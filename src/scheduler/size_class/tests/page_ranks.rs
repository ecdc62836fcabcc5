//! How likely each size class is, by what was executed on them.

use super::*;

const FIVE: Placement = Placement::Foreground {
    timeout: Duration::from_secs(5),
};

fn strategies(exponent: f64, known: &[(u32, &[PreviousExecution])]) -> Strategies {
    page_rank(exponent).strategies(&statistics(known), CLASSES, 15 * MINUTE)
}

/// Probabilities may differ by half a percent.
fn assert_near(strategies: &Strategies, expected: &[(f64, Placement)]) {
    assert_eq!(strategies.smaller.len(), expected.len(), "{strategies:?}");
    for (strategy, (probability, placement)) in strategies.smaller.iter().zip(expected) {
        assert!(
            (strategy.probability - probability).abs() <= 0.005,
            "{strategies:?}"
        );
        assert_eq!(strategy.placement, *placement);
    }
}

#[test]
fn one_size_class_is_no_choice() {
    let strategies = page_rank(0.5).strategies(&Statistics::default(), &[8], MINUTE);
    assert_eq!(strategies, Strategies::default());
}

/// As long as the largest never succeeded, the smallest that is untried.
#[test]
fn what_was_never_seen_is_tried_from_the_smallest_on() {
    let once: &[PreviousExecution] = &[success(1)];
    assert_near(&strategies(0.5, &[]), &[(1.0, FIVE)]);
    assert_near(&strategies(0.5, &[(1, once)]), &[(0.0, FIVE), (1.0, FIVE)]);
    assert_near(
        &strategies(0.5, &[(1, once), (2, once)]),
        &[(0.0, FIVE), (0.0, FIVE), (1.0, FIVE)],
    );
    // The largest.
    assert_near(&strategies(0.5, &[(1, once), (2, once), (4, once)]), &[]);
}

#[test]
fn one_success_on_the_smallest_and_the_largest_makes_all_likely() {
    let once: &[PreviousExecution] = &[success(1)];
    assert_near(
        &strategies(0.5, &[(1, once), (8, once)]),
        &[(0.19, FIVE), (0.33, FIVE), (0.33, FIVE)],
    );
}

#[test]
fn after_one_failure_the_next_larger_is_tried_in_the_background() {
    assert_near(
        &strategies(0.5, &[(1, &[Failed]), (8, &[success(1)])]),
        &[(0.0, Placement::Background), (1.0, Placement::Background)],
    );
}

#[test]
fn near_the_timeout_the_largest_is_most_likely() {
    let timed_out = TimedOut(seconds(900));
    let on_4 = [
        Succeeded(Duration::from_nanos(744_745_171_748)),
        Succeeded(Duration::from_nanos(736_585_305_066)),
        Succeeded(Duration::from_nanos(786_526_637_558)),
        timed_out,
        Succeeded(Duration::from_nanos(773_860_202_581)),
    ];
    let on_8 = [
        652, 624, 630, 627, 651, 655, 649, 653, 648, 666, 640, 636, 669, 638, 667, 639, 645, 659,
        646, 623, 642, 634, 692,
    ];
    let mut on_1 = [timed_out; 7];
    on_1[0] = TimedOut(Duration::from_millis(7500));
    let known: &[(u32, &[PreviousExecution])] = &[
        (1, &on_1),
        (2, &[timed_out; 7]),
        (4, &on_4),
        (8, &on_8.map(success)),
    ];
    let expected = [0.07, 0.06, 0.07].map(|share| (share, Placement::Background));
    assert_near(&strategies(0.5, known), &expected);
}

#[test]
fn an_untried_size_class_is_likely() {
    let on_1 = [
        19941089, 20017118, 21509286, 31062553, 32028792, 56637488, 20011641, 32338320, 21190311,
        19520433, 19496810, 34248944, 39543182, 21466694, 20287814, 20572146, 20582404, 21701414,
        21688507, 20296545, 19621454, 41513823, 22492816, 20089137, 36233309, 21063001, 37055862,
        18909835,
    ];
    let nanos = |nanos| Succeeded(Duration::from_nanos(nanos));
    let known: &[(u32, &[PreviousExecution])] = &[
        (1, &on_1.map(nanos)),
        (4, &[nanos(19648577), nanos(26058621)]),
        (8, &[nanos(21127338)]),
    ];
    let expected = [(0.14, FIVE), (0.56, FIVE), (0.15, FIVE)];
    assert_near(&strategies(0.5, known), &expected);
}

#[test]
fn what_always_fails_is_nearly_never_tried() {
    let failures = [Failed; 30];
    let mut on_8 = vec![success(14); 10];
    on_8.extend([success(15); 10]);
    on_8.extend([success(16); 10]);
    let known: &[(u32, &[PreviousExecution])] =
        &[(1, &failures), (2, &failures), (4, &failures), (8, &on_8)];
    assert_near(&strategies(1.0, known), &[(0.02, Placement::Background); 3]);
}

#[test]
fn durations_beyond_the_timeout_are_borne() {
    let (calculator, timeout) = (page_rank(1.0), seconds(150));
    let on_largest = [success(151)];
    assert_near(
        &calculator.strategies(&statistics(&[(8, &on_largest)]), CLASSES, timeout),
        &[(1.0, Placement::Background)],
    );
    assert_eq!(
        calculator.background_timeout(&on_largest, 1, 8, timeout),
        timeout
    );
}

/// Restored ones are where the next computation starts; it ends at the same ones.
#[test]
fn probabilities_are_remembered_and_do_not_depend_on_those_before() {
    let once: &[PreviousExecution] = &[success(1)];
    let known = statistics(&[(1, once), (8, once)]);
    let first = page_rank(0.5).strategies(&known, CLASSES, 15 * MINUTE);
    for probabilities in [
        first.probabilities.clone(),
        Arc::new([(2, 0.99), (4, f64::NAN), (8, -3.0)]),
    ] {
        let update = StatisticsUpdate {
            probabilities,
            ..StatisticsUpdate::new(key(), 5)
        };
        let again = page_rank(0.5).strategies(&updated(&known, Some(update)), CLASSES, 15 * MINUTE);
        let expected: Vec<_> = first
            .smaller
            .iter()
            .map(|strategy| (strategy.probability, strategy.placement))
            .collect();
        assert_near(&again, &expected);
    }
}

/// Chances are met by random numbers.
#[test]
fn size_classes_are_chosen_as_often_as_computed() {
    let once: &[PreviousExecution] = &[success(1)];
    let known = statistics(&[(1, once), (8, once)]);
    let selector = selector(&feedback_driven(Some(page_rank(0.5))), &known);
    let mut chosen = [0; 4];
    for i in 0..1000 {
        chosen[selector
            .select(CLASSES, random(f64::from(i) / 1000.0))
            .index] += 1;
    }
    for (chosen, expected) in chosen.iter().zip([190, 330, 330, 150]) {
        assert!(i32::abs(chosen - expected) <= 10, "{chosen} of {expected}");
    }
}

/// No bounds of the configuration hold for what is stored.
#[test]
fn whatever_is_stored_a_size_class_is_chosen() {
    let durations = [Duration::ZERO, Duration::MAX, seconds(1)];
    for duration in durations {
        let all: &[PreviousExecution] = &[Succeeded(duration), TimedOut(duration), Failed];
        let known = statistics(&[(0, all), (1, all), (u32::MAX, all)]);
        for classes in [&[0, 1, u32::MAX][..], &[0, 1], &[0]] {
            for fraction in [0.0, 0.3, 0.6, 1.0] {
                for timeout in durations {
                    let statistics = Some((key(), Arc::new(known.clone())));
                    let analyzer = feedback_driven(Some(page_rank(0.5)));
                    let selector = analyzer.selector(timeout, statistics, now());
                    let selection = selector.select(classes, random(fraction));
                    assert!(selection.index < classes.len() && selection.timeout <= timeout);
                    let completion = selection.learner.succeeded(Duration::MAX, classes);
                    assert!(completion.next.is_none_or(|next| next.timeout <= timeout));
                }
            }
        }
    }
}
