//! Few samples, so their middle and their ends, and no mean that one of them
//! could carry away.

/// The middle of some samples, and the smallest and the largest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    /// None without a sample, or with one that is not a number.
    pub fn of(samples: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut samples: Vec<f64> = samples.into_iter().collect();
        if samples.iter().any(|sample| !sample.is_finite()) {
            return None;
        }
        samples.sort_by(f64::total_cmp);
        let (min, max) = (*samples.first()?, *samples.last()?);
        let half = samples.len() / 2;
        let median = match samples.len() % 2 {
            1 => samples[half],
            _ => f64::midpoint(samples[half - 1], samples[half]),
        };
        Some(Self { median, min, max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_is_that_of_the_sorted_samples() {
        let spread = |samples: &[f64]| Spread::of(samples.iter().copied());
        let expected = |median, min, max| Some(Spread { median, min, max });
        assert_eq!(spread(&[3.0, 1.0, 100.0]), expected(3.0, 1.0, 100.0));
        assert_eq!(spread(&[4.0, 1.0, 2.0, 8.0]), expected(3.0, 1.0, 8.0));
        assert_eq!(spread(&[7.0]), expected(7.0, 7.0, 7.0));
    }

    #[test]
    fn what_is_no_sample_has_no_spread() {
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([1.0, f64::NAN]), None);
        assert_eq!(Spread::of([f64::INFINITY]), None);
    }
}
