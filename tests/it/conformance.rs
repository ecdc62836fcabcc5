//! Our own farm keeps the rules of the API, by the program that could ask any server.

use std::path::Path;

use crate::harness::{self, Farm};

#[path = "../conformance/suite/mod.rs"]
mod suite;

/// What a farm of ours does not have, and says so.
const UNSUPPORTED: &[&str] = &["where updates are announced as disabled, they are refused"];

#[tokio::test(flavor = "multi_thread")]
async fn a_farm_keeps_the_rules_of_the_api() {
    if !harness::is_root() {
        return;
    }
    let farm = Farm::start(Path::new("/var/tmp"), 2, "").await;
    let endpoint = format!("grpc://127.0.0.1:{}", farm.port());
    let mut options = suite::Options::of(endpoint.parse().unwrap());
    options.platform = vec![("OSFamily".to_owned(), "linux".to_owned())];
    let report = suite::run(&options).await.unwrap();
    let table = report.table();
    let texts = |result: &str| -> Vec<&str> {
        let rows = report.rows.iter().filter(|row| row.result() == result);
        rows.map(|row| row.rule.text).collect()
    };
    assert_eq!(texts("fail"), [""; 0], "{table}");
    assert_eq!(texts("unsupported"), UNSUPPORTED, "{table}");
    assert!(report.is_conformant());
    assert!(report.junit().contains("failures=\"0\""));
}
