//! Small charts, as SVG without style of its own.

use std::fmt::Write;

use maud::{Markup, html};

const WIDTH: f64 = 240.0;
const HEIGHT: f64 = 44.0;

/// Values of the last hour, the newest last; `None` where nothing is known.
pub(super) fn chart(label: &str, values: &[Option<f64>], places: usize, most: f64) -> Markup {
    let step = WIDTH / (places.max(2) - 1) as f64;
    let skipped = places.saturating_sub(values.len());
    let mut line = String::new();
    let mut area = String::new();
    let mut begun: Option<f64> = None;
    let mut last = 0.0;
    let close = |area: &mut String, begun: &mut Option<f64>, end: f64| {
        if let Some(begin) = begun.take() {
            let _ = write!(area, "L{end:.1},{HEIGHT} L{begin:.1},{HEIGHT} Z ");
        }
    };
    for (place, value) in values.iter().enumerate() {
        let x = (place + skipped) as f64 * step;
        let Some(value) = value else {
            close(&mut area, &mut begun, last);
            continue;
        };
        let y = HEIGHT - 1.0 - (value / most).clamp(0.0, 1.0) * (HEIGHT - 4.0);
        let verb = if begun.is_none() { 'M' } else { 'L' };
        begun.get_or_insert(x);
        let _ = write!(line, "{verb}{x:.1},{y:.1} ");
        let _ = write!(area, "{verb}{x:.1},{y:.1} ");
        last = x;
    }
    close(&mut area, &mut begun, last);
    html! {
        svg.chart viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } preserveAspectRatio="none" role="img" aria-label=(label) {
            path.area d=(area.trim_end()) {}
            path.line d=(line.trim_end()) vector-effect="non-scaling-stroke" {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_has_gaps_where_nothing_is_known_and_stays_in_its_frame() {
        let values = [Some(1.0), None, Some(9.0), Some(3.0)];
        let drawn = chart("Queued", &values, 4, 4.0).into_string();
        assert_eq!(drawn.matches('M').count(), 4, "{drawn}");
        assert!(drawn.contains("aria-label=\"Queued\""), "{drawn}");
        assert!(!drawn.contains('-') || !drawn.contains(",-"), "{drawn}");
        chart("Empty", &[], 360, 1.0);
    }
}
