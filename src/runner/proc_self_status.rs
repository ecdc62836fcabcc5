//! What the kernel says of this process (proc_pid_status(5)).

/// A bit set.
pub(super) fn bits(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let digits = status.lines().find_map(|line| line.strip_prefix(field))?;
    u64::from_str_radix(digits.trim(), 16).ok()
}
