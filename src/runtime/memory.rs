//! The memory of this machine.

/// Bytes of memory in all and free; a container's limit counts more than the machine's.
pub fn machine() -> (u64, u64) {
    let system = sysinfo::System::new_with_specifics(
        sysinfo::RefreshKind::nothing().with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram()),
    );
    let machine = (system.total_memory(), system.available_memory());
    system.cgroup_limits().map_or(machine, |limits| (limits.total_memory, limits.free_memory))
}
