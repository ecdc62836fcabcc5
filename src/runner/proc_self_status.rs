//! What the kernel says of this process (proc_pid_status(5)).

/// The value of a field that is a bit set, such as `CapEff:`; `None` where the kernel has no such field.
pub(super) fn bits(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let digits = status.lines().find_map(|line| line.strip_prefix(field))?;
    u64::from_str_radix(digits.trim(), 16).ok()
}
