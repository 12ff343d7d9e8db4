//! Numbers as people read them.

use std::time::Duration;

/// `1234567` → `1,234,567`.
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, d) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(d);
    }
    out
}

/// Bytes in decimal units with three significant digits: `940 B`, `3.76 MB`, `270 MB`.
pub fn bytes(n: u64) -> String {
    let (mut value, mut units) = (n as f64, ["B", "kB", "MB", "GB", "TB"].iter());
    let mut unit = units.next().copied().unwrap_or_default();
    for next in units {
        if value < 999.5 {
            break;
        }
        value /= 1000.0;
        unit = next;
    }
    let decimals = if unit == "B" || value >= 99.95 { 0 } else { 2 - usize::from(value >= 9.995) };
    format!("{value:.decimals$} {unit}")
}

/// `0.8 s`, `42 s`, `3 min 05 s`, `2 h 10 min`.
pub fn duration(d: Duration) -> String {
    let s = d.as_secs_f64().round() as u64;
    match s {
        0..10 => format!("{:.1} s", d.as_secs_f64()),
        10..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        _ => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
    }
}

/// A share as a percentage with one decimal: `52.1 %`.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!([0, 999, 1000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(
            [0, 940, 1500, 3_764_000, 26_999_000, 270_000_000, 999_600_000].map(bytes),
            ["0 B", "940 B", "1.50 kB", "3.76 MB", "27.0 MB", "270 MB", "1.00 GB"]
        );
        assert_eq!(
            [800, 42_000, 185_000, 7_800_000].map(|ms| duration(Duration::from_millis(ms))),
            ["0.8 s", "42 s", "3 min 05 s", "2 h 10 min"]
        );
        assert_eq!(percent(0.5214), "52.1 %");
    }
}
