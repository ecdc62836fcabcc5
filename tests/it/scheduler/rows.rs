//! What Buildbarn's scheduler does, law by law: by which tests each is held here, or why it is otherwise.
//!
//! The last column of `HELD` names tests, wherever they are; one that is renamed or gone is found out.

use std::{collections::BTreeSet, fs};

use walkdir::WalkDir;

/// A law, and the tests that hold it.
const HELD: &[(&str, &[&str])] = &[
    // Listeners, and who may call.
    (
        "clients have a listener with Execution and Capabilities, workers one of their own",
        &[
            "both_ports_say_that_they_are_healthy_and_what_they_serve",
            "reflection_lists_just_what_is_served",
        ],
    ),
    (
        "BuildQueueState has a listener, with eleven methods as they are published",
        &[
            "the_queue_state_is_as_published",
            "queues_invocations_operations_and_workers_are_listed_as_portals_expect",
        ],
    ),
    (
        "Execute, WaitExecution, GetCapabilities, Synchronize, drains and kills ask who calls; so do lists and termination",
        &[
            "every_method_is_refused_to_nobody_and_to_the_wrong_one_on_every_port",
            "every_method_of_our_protocols_that_a_scheduler_serves_is_in_the_table",
        ],
    ),
    // Execute.
    (
        "a malformed instance name, digest or platform is INVALID_ARGUMENT; an Action that is absent is FAILED_PRECONDITION with its blob",
        &[
            "whoever_is_at_fault_is_told_so_and_why",
            "bad_input_gets_a_clear_error_and_the_farm_goes_on",
        ],
    ),
    (
        "properties are strictly sorted by name, then value; names may repeat; none is the empty platform",
        &[
            "properties_are_sorted_by_name_then_value_and_names_may_repeat",
            "properties_out_of_order_are_no_platform",
        ],
    ),
    (
        "a timeout is the action's own, the default, or INVALID_ARGUMENT outside of the bounds, and is sent to the worker",
        &["a_timeout_is_the_actions_own_within_bounds_or_the_default"],
    ),
    (
        "equal cacheable actions of one instance are one task; of one invocation one operation",
        &[
            "equal_actions_share_a_task_unless_they_may_not",
            "equal_actions_are_executed_once_for_all_clients",
        ],
    ),
    (
        "operations of several invocations on one task count for each of them, and leave one by one",
        &[
            "a_queued_task_leaves_each_invocation_that_abandons_it_and_ends_with_the_last",
            "an_executing_task_leaves_each_invocation_that_abandons_it_and_ends_with_the_last",
        ],
    ),
    (
        "the platform matches exactly, of prefixes the longest wins; unknown ones are UNAVAILABLE at first, FAILED_PRECONDITION later",
        &[
            "the_longest_instance_name_prefix_wins_and_the_worker_learns_the_rest",
            "unknown_platforms_are_unavailable_at_first_and_then_an_error_that_lists_what_there_is",
            "an_old_scheduler_says_that_no_workers_exist_as_the_clients_fault",
        ],
    ),
    (
        "the first message is the present state, the last one has the ExecuteResponse, and in between it is repeated",
        &[
            "an_action_goes_to_a_worker_and_its_result_to_the_client",
            "a_waiting_client_hears_again_and_again",
        ],
    ),
    (
        "WaitExecution of an unknown name is NOT_FOUND",
        &["names_that_are_forged_cut_or_foreign_give_nothing_that_execute_would_not"],
    ),
    (
        "an operation without waiters goes, and its task with the last one, as CANCELLED; a result stays for a minute",
        &[
            "an_operation_without_waiters_goes_after_ten_seconds_and_its_task_with_it",
            "a_result_can_be_fetched_for_a_minute",
        ],
    ),
    // Routing.
    (
        "the platform is the action's, its command's, or a static one",
        &[
            "an_action_without_a_platform_has_the_one_of_its_command",
            "clients_before_2_2_name_the_platform_in_their_command",
            "what_bazel_sends_unasked_tells_no_platforms_apart",
        ],
    ),
    (
        "routers are chosen by the longest prefix and the platform; one may be another program",
        &[
            "the_router_is_that_of_the_longest_prefix_and_the_exact_platform",
            "a_remote_router_may_change_the_action_and_must_name_platform_and_keys",
            "a_remote_router_decides_and_its_refusal_is_the_clients",
        ],
    ),
    (
        "invocation keys are tool invocation, correlated invocations and user, in levels; absent metadata is an empty key",
        &["levels_of_the_tree_are_those_of_the_extractors_and_a_user_only_where_there_is_one"],
    ),
    // Fairness.
    (
        "a node's own operations come first, then the child with the least (workers + 1) · 2^(priority / 100), then the one served least recently",
        &[
            "what_hangs_at_an_invocation_itself_comes_before_those_below_it",
            "invocations_are_served_in_turn",
            "a_hundred_steps_of_priority_are_twice_the_share",
            "users_share_before_their_builds_do",
            "the_next_operation_is_one_that_a_naive_model_would_choose",
        ],
    ),
    (
        "within an invocation the most urgent comes first, then what takes longer, then the older; all priorities are in order",
        &[
            "the_most_urgent_then_the_oldest_task_comes_first",
            "the_most_extreme_priorities_are_in_order",
            "the_next_operation_is_one_that_a_naive_model_would_choose",
        ],
    ),
    (
        "new work goes to an idle worker of its invocation, else to the nearest one",
        &[
            "new_work_goes_to_the_idle_worker_that_last_worked_for_its_invocation",
            "ten_idle_workers_of_nested_invocations_are_found_from_the_nearest_on",
        ],
    ),
    (
        "stickiness decides among equals, for so long at each level",
        &["a_worker_stays_with_its_invocation_among_equals_for_as_long_as_it_may"],
    ),
    (
        "a worker's last invocation is what all operations of its task have in common",
        &["a_worker_is_near_what_all_operations_of_its_last_task_had_in_common"],
    ),
    // Size classes.
    (
        "without feedback the smallest comes first, and any failure is tried once more on the largest",
        &[
            "what_fails_on_the_smallest_is_executed_once_more_on_the_largest",
            "a_success_on_the_smallest_is_final",
            "a_failure_on_the_only_size_class_is_final",
        ],
    ),
    (
        "feedback skips smaller ones after a failure, keeps a history by command and platform, and learns in the background within a limit",
        &[
            "a_failure_on_the_largest_is_final_and_skips_the_smaller_ones_for_a_day",
            "an_action_is_known_by_its_command_and_platform",
            "no_more_than_the_history_is_kept",
            "what_succeeded_on_the_largest_is_executed_on_a_smaller_one_for_nobody_but_us",
            "no_more_is_learnt_than_may_be_queued",
            "what_is_abandoned_teaches_nothing",
            "a_success_is_remembered",
            "a_failure_on_a_smaller_class_counts_once_the_largest_succeeds",
            "an_execution_in_the_background_follows_a_success_and_is_remembered",
        ],
    ),
    (
        "the choice is the stationary distribution of a walk between size classes",
        &[
            "one_size_class_is_no_choice",
            "what_was_never_seen_is_tried_from_the_smallest_on",
            "one_success_on_the_smallest_and_the_largest_makes_all_likely",
            "near_the_timeout_the_largest_is_most_likely",
            "an_untried_size_class_is_likely",
            "what_always_fails_is_nearly_never_tried",
            "durations_beyond_the_timeout_are_borne",
        ],
    ),
    (
        "run times are compared pair by pair, and nothing is faster than itself",
        &[
            "nothing_is_faster_than_itself",
            "shares_are_of_pairs_with_one_given_to_each_side",
            "the_median_is_of_successes",
        ],
    ),
    (
        "a size above the declared ones, or none, is INVALID_ARGUMENT; one in between is taken",
        &["a_size_above_those_declared_or_none_at_all_is_refused_and_one_between_is_taken"],
    ),
    (
        "statistics survive in the initial size class cache, written behind",
        &[
            "statistics_survive_the_scheduler",
            "statistics_survive_their_encoding_and_what_others_cannot_have_written_is_said",
            "what_was_forgotten_while_the_action_was_queued_is_read_again_before_it_is_written",
        ],
    ),
    (
        "predeclared queues are never removed",
        &[
            "work_waits_for_a_predeclared_pool_of_no_workers_for_ever",
            "a_predeclared_queue_holds_work_for_workers_to_come_also_of_those_who_ask_for_less",
        ],
    ),
    // Workers.
    (
        "a second call at once is RESOURCE_EXHAUSTED",
        &[
            "two_calls_of_one_worker_at_once_are_one_too_many",
            "a_worker_may_call_once_at_a_time_and_again_when_its_connection_is_lost",
        ],
    ),
    (
        "an idle worker is given work at once, or its call is held for up to two minutes",
        &[
            "an_idle_synchronizing_worker_gets_a_task_at_once_and_its_client_hears_that_it_executes",
            "a_held_call_ends_after_its_time",
        ],
    ),
    (
        "a worker that forgets its task gets it nine times again, then the action fails with INTERNAL",
        &["a_worker_that_forgets_its_task_gets_it_nine_times_again"],
    ),
    (
        "a worker that prefers being idle is answered at once, and gets nothing new",
        &[
            "a_worker_that_stops_hands_its_task_back",
            "a_farm_keeps_its_promises_whatever_the_network_does",
        ],
    ),
    (
        "a queue without workers goes after a quarter of an hour, and what waits in it with UNAVAILABLE",
        &[
            "a_queue_without_workers_goes_after_a_quarter_of_an_hour_with_what_waits_in_it",
            "a_queue_that_ends_without_workers_names_those_that_were_lost_with_an_action",
        ],
    ),
    // Operators.
    (
        "drains are for all labels of a pattern; a drained worker ends what it executes, and is woken when the drain goes",
        &[
            "a_drained_worker_waits_without_work_and_gets_it_when_the_drain_goes",
            "a_drained_worker_ends_what_it_executes",
            "a_drained_worker_gets_no_work_also_after_a_restart_until_the_drain_is_removed",
        ],
    ),
    (
        "TerminateWorkers waits for what they execute",
        &[
            "who_terminates_workers_hears_what_they_execute_and_they_get_nothing_new",
            "termination_waits_for_what_workers_run_and_hands_out_nothing_more",
        ],
    ),
    (
        "KillOperations gives the operator's status, by name or where no workers are",
        &[
            "who_kills_an_operation_says_what_its_client_hears_and_its_worker_becomes_idle",
            "what_is_queued_is_killed_only_where_no_workers_are_a_few_at_a_time",
            "killed_operations_end_with_the_operators_status",
            "what_operators_ask_wrongly_is_told",
        ],
    ),
    (
        "queues, invocations, operations and workers are listed with filters, page by page",
        &[
            "whoever_looks_at_the_queue_sees_what_there_is",
            "queues_invocations_operations_and_workers_are_listed_as_portals_expect",
        ],
    ),
    // What Buildbarn's lacks.
    (
        "unless it skips the look-up, an action has the result of the Action Cache",
        &[
            "a_result_that_the_action_cache_has_is_given_at_once_and_marked_as_cached",
            "a_result_is_not_given_to_who_skips_the_look_up_nor_without_its_outputs",
        ],
    ),
    (
        "google.longrunning.Operations lists, gets, waits and cancels",
        &[
            "operations_are_listed_page_by_page_and_by_filter",
            "an_operation_can_be_got_waited_for_and_cancelled_by_its_name",
        ],
    ),
    (
        "a restart loses neither what runs nor what is queued, and another scheduler may take over",
        &[
            "what_was_queued_is_queued_again_under_its_name_at_the_next_scheduler",
            "what_runs_is_not_run_again_by_the_scheduler_that_takes_over_the_address",
            "what_runs_goes_on_when_the_scheduler_restarts",
        ],
    ),
    (
        "drains survive a restart",
        &[
            "drains_are_there_after_a_restart_for_workers_that_come_then",
            "what_was_drained_is_drained_after_a_restart",
        ],
    ),
    (
        "queued operations, invocations, queues and workers are bounded; beyond, clients are to try again",
        &[
            "beyond_a_limit_of_queued_operations_clients_are_to_try_again_later",
            "keys_beyond_the_limit_of_invocations_share_the_node_above",
            "ten_thousand_streams_instance_names_and_invocations_of_one_connection_are_queued_up_to_the_limit",
            "workers_and_platform_queues_are_bounded",
        ],
    ),
    (
        "whoever waits can hear why, also by a command",
        &[
            "whoever_waits_can_hear_why",
            "each_question_has_a_command_and_none_lets_clients_write_to_the_terminal",
        ],
    ),
];

/// A law of Buildbarn's; what is so here instead; the tests of that.
const OTHERWISE: &[(&str, &str, &[&str])] = &[
    (
        "a lost worker's task fails with UNAVAILABLE",
        "it is executed elsewhere three times first, as most clients try again themselves only a few times; then the error names all that were lost",
        &[
            "what_a_lost_worker_had_is_executed_elsewhere_and_its_client_hears_of_nothing_but_that",
            "a_task_that_lost_four_workers_fails_and_names_them",
            "what_a_lost_worker_brings_late_changes_nothing",
            "what_a_silent_worker_executed_is_executed_by_another_one",
        ],
    ),
    (
        "a worker is forgotten 60 s after its last call",
        "60 s after its next call was due, as one that may be silent for 10 s is not late before",
        &["a_silent_worker_is_gone_and_its_task_fails_where_it_may_not_be_executed_again"],
    ),
    (
        "what a client leaves goes on for 60 s, and its worker hears of it within 10 s",
        "for 10 s, and a worker that numbers its calls hears of it at once: an interrupted build holds up nobody",
        &[
            "an_operation_without_waiters_goes_after_ten_seconds_and_its_task_with_it",
            "a_held_call_of_a_busy_worker_is_answered_at_once_when_its_operation_is_cancelled",
        ],
    ),
    (
        "a restart makes workers stop what they execute",
        "they go on, and whoever asks for it again has it",
        &[
            "what_runs_goes_on_when_the_scheduler_restarts",
            "what_nobody_asks_for_within_a_minute_is_stopped",
        ],
    ),
    (
        "all properties of a platform count",
        "some do not that clients send unasked, or a queue may take any value",
        &[
            "ignored_properties_do_not_matter",
            "a_queue_may_take_any_value_and_smaller_numbers",
        ],
    ),
    (
        "an operation's name is a UUID alone",
        "it also says what is needed to take it up again; a UUID alone still names what this scheduler has",
        &[
            "names_that_are_forged_cut_or_foreign_give_nothing_that_execute_would_not",
            "the_name_of_an_ordinary_operation_is_short",
        ],
    ),
    (
        "a report of a digest is of the task that its worker has, and the next task follows in its answer",
        "not the same digest again: where an answer is lost, the report is repeated, and would be taken for the end of an action of another instance",
        &[
            "what_a_worker_reports_by_its_digest_alone_is_not_taken_for_the_same_action_of_another_instance",
        ],
    ),
    (
        "a worker that was told to terminate gets nothing until it has been silent for 60 s",
        "until another process has its place: that one was told nothing",
        &["a_worker_that_was_told_to_terminate_and_is_started_again_gets_work"],
    ),
    (
        "who lists and terminates is asked for no permission",
        "everybody is",
        &["every_method_is_refused_to_nobody_and_to_the_wrong_one_on_every_port"],
    ),
];

/// Names of all tests of the project.
fn tests() -> BTreeSet<String> {
    let mut tests = BTreeSet::new();
    for part in ["src", "tests"] {
        let directory = format!("{}/{part}", env!("CARGO_MANIFEST_DIR"));
        for file in WalkDir::new(directory) {
            let file = file.unwrap();
            if file.path().extension().is_none_or(|end| end != "rs") {
                continue;
            }
            let source = fs::read_to_string(file.path()).unwrap();
            let mut is_test = false;
            for line in source.lines().map(str::trim) {
                if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
                    is_test = true;
                } else if let Some((_, function)) = line.split_once("fn ") {
                    if is_test && let Some((name, _)) = function.split_once('(') {
                        tests.insert(name.to_owned());
                    }
                    is_test = false;
                }
            }
        }
    }
    tests
}

#[test]
fn each_law_of_buildbarns_scheduler_is_held_by_tests_that_there_are_or_is_otherwise_for_a_reason() {
    let tests = tests();
    let otherwise = OTHERWISE.iter().map(|(law, why, held)| {
        assert!(!why.is_empty(), "{law}");
        (*law, *held)
    });
    let mut laws = BTreeSet::new();
    for (law, held) in HELD.iter().copied().chain(otherwise) {
        assert!(laws.insert(law), "twice: {law}");
        assert!(!held.is_empty(), "held by nothing: {law}");
        for test in held {
            assert!(tests.contains(*test), "there is no test {test}: {law}");
        }
    }
}
