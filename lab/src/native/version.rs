//! Comparing version numbers.

/// Is this version, such as `3.10.8`, as new as the wanted one, such as
/// `[3, 10]`? What follows the numbers, such as `-rc.1`, does not count.
pub(crate) fn at_least(version: &str, wanted: &[u32]) -> bool {
    let numbers: Vec<u32> = version
        .split('.')
        .map_while(|part| {
            let digits = part.find(|c: char| !c.is_ascii_digit());
            part[..digits.unwrap_or(part.len())].parse().ok()
        })
        .collect();
    numbers.as_slice() >= wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_compared_as_numbers() {
        assert!(at_least("3.10.8", &[3, 10]));
        assert!(at_least("4", &[3, 10]));
        assert!(at_least("17", &[17]));
        assert!(at_least("4.3.0-rc.1", &[4, 3, 0]));
        assert!(!at_least("3.9.20", &[3, 10]));
        assert!(!at_least("11.0.2", &[17]));
        assert!(!at_least("unknown", &[3, 10]));
    }
}
