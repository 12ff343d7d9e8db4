//! What a line or a bar says of a step, the most important first: what does not fit on the terminal is left out.

use super::StepMetrics;
use super::human;
use indicatif::ProgressStyle;

/// Columns of a bar itself.
pub const BAR: usize = 12;

/// `align ━━━━━━━━━━━━ 123/600  …`; the message is as long as there is room for, so that nothing wraps.
pub fn stage_style() -> ProgressStyle {
    style(&format!("{{prefix}} {{bar:{BAR}}} {{pos}}/{{len}}  {{wide_msg}}"))
}

/// The same for what is no stage.
pub fn progress_style(bytes: bool) -> ProgressStyle {
    let numbers = if bytes { "{decimal_bytes}/{decimal_total_bytes}" } else { "{pos}/{len}" };
    style(&format!("{{prefix}} {{bar:{BAR}}} {numbers}  {{wide_msg}}"))
}

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.progress_chars("━╸─")
}

/// `loss 0.4821`, the optimizer's figures, the time that is left: each with its rank, by which the last are left out first.
pub fn parts(m: &StepMetrics, left: String) -> Vec<(u8, String)> {
    let mut parts = vec![(0, format!("loss {:.4}", m.loss))];
    let rates = || m.lr.values().chain(m.lr_lowest.values()).copied();
    let (low, high) = (rates().fold(f64::INFINITY, f64::min), rates().fold(0.0, f64::max));
    parts.push(match low < high {
        true => (4, format!("lr {low:.1e} to {high:.1e}")),
        false => (4, format!("lr {high:.1e}")),
    });
    parts.push((3, format!("grad {:.3}", m.grad_norm_total)));
    if let Some(p) = &m.preference {
        parts.push((2, format!("margin {:.3}  accuracy {:.2}", p.margin, p.accuracy)));
    }
    parts.push((5, format!("{} tokens/s", human::thousands(m.tokens_per_s.max(0.0) as u64))));
    parts.push((1, left));
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_styles_are_valid() {
        for template in ["{prefix} {bar:12} {pos}/{len}  {wide_msg}", "{decimal_bytes}/{decimal_total_bytes}"] {
            assert!(ProgressStyle::with_template(template).is_ok());
        }
    }
}
