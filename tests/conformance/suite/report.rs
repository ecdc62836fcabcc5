//! What became of the rules, as a table and as JUnit's XML.

use std::{fmt::Write, time::Duration};

use super::rule::{Level, Outcome, Rule, Stop};

pub struct Row {
    pub rule: &'static Rule,
    pub outcome: Outcome,
    pub took: Duration,
}

pub struct Report {
    pub server: String,
    pub rows: Vec<Row>,
}

impl Row {
    pub fn result(&self) -> &'static str {
        match self.outcome {
            Ok(()) => "pass",
            Err(Stop::Fail(_)) => "fail",
            Err(Stop::Unsupported(_)) => "unsupported",
        }
    }

    fn level(&self) -> &'static str {
        match self.rule.level {
            Level::Must => "MUST",
            Level::Should => "SHOULD",
        }
    }

    fn reason(&self) -> Option<&str> {
        match &self.outcome {
            Ok(()) => None,
            Err(Stop::Fail(reason) | Stop::Unsupported(reason)) => Some(reason),
        }
    }
}

impl Report {
    fn count(&self, level: Level, result: &str) -> usize {
        let rows = self.rows.iter().filter(|row| row.rule.level == level);
        rows.filter(|row| row.result() == result).count()
    }

    /// Whether no rule failed that a server MUST keep.
    pub fn is_conformant(&self) -> bool {
        self.count(Level::Must, "fail") == 0
    }

    /// A line for each rule, with the reason of what did not pass below it.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let longest = self.rows.iter().map(|row| row.rule.section.len()).max();
        let width = longest.unwrap_or(0);
        for row in &self.rows {
            let (result, level) = (row.result(), row.level());
            let (section, rule) = (row.rule.section, row.rule.text);
            let _ = writeln!(text, "{result:11}  {level:6}  {section:width$}  {rule}");
            if let Some(reason) = row.reason() {
                for line in reason.lines() {
                    let _ = writeln!(text, "{:11}  {line}", "");
                }
            }
        }
        for (level, name) in [(Level::Must, "MUST"), (Level::Should, "SHOULD")] {
            let of = |result| self.count(level, result);
            let (passed, failed, unsupported) = (of("pass"), of("fail"), of("unsupported"));
            let _ = writeln!(
                text,
                "{name}: {passed} passed, {failed} failed, {unsupported} unsupported"
            );
        }
        text
    }

    /// As continuous integration reads it.
    pub fn junit(&self) -> String {
        let of = |result| self.count(Level::Must, result) + self.count(Level::Should, result);
        let mut text = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites>\n<testsuite name=\"REAPI v2 conformance of {}\" tests=\"{}\" failures=\"{}\" skipped=\"{}\">\n",
            escape(&self.server),
            self.rows.len(),
            of("fail"),
            of("unsupported"),
        );
        for row in &self.rows {
            let _ = write!(
                text,
                "<testcase classname=\"{}\" name=\"{}: {}\" time=\"{:.3}\"",
                escape(row.rule.section),
                row.level(),
                escape(row.rule.text),
                row.took.as_secs_f64(),
            );
            let _ = match &row.outcome {
                Ok(()) => writeln!(text, "/>"),
                Err(Stop::Fail(reason)) => writeln!(
                    text,
                    "><failure message=\"{}\"/></testcase>",
                    escape(reason)
                ),
                Err(Stop::Unsupported(reason)) => writeln!(
                    text,
                    "><skipped message=\"{}\"/></testcase>",
                    escape(reason)
                ),
            };
        }
        text + "</testsuite>\n</testsuites>\n"
    }
}

/// For an attribute of XML 1.0, which has no control characters.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\n' => escaped.push_str("&#10;"),
            c if c.is_control() => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}
