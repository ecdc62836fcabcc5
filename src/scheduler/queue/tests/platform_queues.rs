//! Which workers an action goes to.

use super::*;

#[test]
fn the_longest_instance_name_prefix_wins_and_the_worker_learns_the_rest() {
    let mut farm = Farm::new();
    for (i, prefix) in ["", "a", "a/b"].into_iter().enumerate() {
        assert!(matches!(
            farm.call(&key(prefix), "w", idle(), i as u32),
            SynchronizeAnswer::Held(_)
        ));
    }
    for (instance, call, suffix) in [("a/b/c", 2, "c"), ("ab", 0, "ab"), ("a", 1, "")] {
        let mut request = request("x");
        Arc::make_mut(&mut request.action).instance = InstanceName::parse(instance).unwrap();
        farm.execute(request, 0).unwrap();
        let DesiredWorkerState::Execute { suffix: rest, .. } = &farm.answered[&call].desired else {
            panic!("{instance} went elsewhere");
        };
        assert_eq!(rest.as_str(), suffix);
    }
}

#[test]
fn unknown_platforms_are_unavailable_at_first_and_then_an_error_that_lists_what_there_is() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    let plan9 = Platform::from(&BTreeMap::from([("OSFamily".into(), "plan9".into())]));
    let ask = |farm: &mut Farm| {
        let request = Request {
            platform: plan9.clone(),
            ..request("x")
        };
        match farm.execute(request, 1).unwrap_err() {
            ExecuteRefusal::NoWorkers(error) => error,
            full => panic!("{full}"),
        }
    };
    assert!(ask(&mut farm).transient);
    farm.pass(15 * 60 * SECOND);
    farm.held("a", idle(), 2);
    let error = ask(&mut farm);
    assert!(!error.transient);
    assert_eq!(
        error.to_string(),
        "No workers exist for instance name prefix \"\" platform \
         {\"properties\":[{\"name\":\"OSFamily\",\"value\":\"plan9\"}]}; workers exist for \
         \"\" {\"properties\":[{\"name\":\"OSFamily\",\"value\":\"linux\"}]} (which differs in OSFamily)"
    );
}

#[test]
fn actions_without_properties_go_to_the_default_platform_unless_workers_offer_none() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    let nothing = || Request {
        platform: Platform::default(),
        ..request("x")
    };
    let attached = farm.execute(nothing(), 1).unwrap();
    assert_eq!(attached.progress.stage, Stage::Executing);
    farm.held("a", completed("x", rpc::Code::Ok), 2);
    let bare = SizeClassQueueKey {
        platform: Platform::default(),
        ..key("")
    };
    farm.call(&bare, "b", idle(), 3);
    farm.execute(nothing(), 1).unwrap();
    assert_eq!(action(&farm.answered[&3]), Some(digest("x")));
}

#[test]
fn a_queue_without_workers_goes_after_a_quarter_of_an_hour_with_what_waits_in_it() {
    let mut farm = Farm::new();
    farm.held("a", idle(), 1);
    farm.execute(request("x"), 1).unwrap();
    for i in 0..200 {
        farm.execute(request(&format!("y{i}")), 2).unwrap();
    }
    farm.pass(70 * SECOND);
    farm.pass(15 * 60 * SECOND);
    let (code, message) = status(&farm.told[&2]);
    assert_eq!(code, rpc::Code::Unavailable as i32);
    assert!(
        message.contains("disappeared while task was queued"),
        "{message}"
    );
    assert_eq!(farm.queue.counts().queues, 0);
    assert_eq!(farm.queue.platform_queues().len(), 0);
}

#[test]
fn properties_out_of_order_are_no_platform() {
    let property = |name: &str, value: &str| reapi::platform::Property {
        name: name.to_owned(),
        value: value.to_owned(),
    };
    let parse = |properties| Platform::parse(Some(&reapi::Platform { properties }));
    assert!(parse(vec![property("a", "2"), property("b", "1")]).is_ok());
    assert!(parse(vec![property("a", "1"), property("a", "2")]).is_ok());
    assert!(parse(vec![property("b", "1"), property("a", "2")]).is_err());
    assert!(parse(vec![property("a", "1"), property("a", "1")]).is_err());
}
