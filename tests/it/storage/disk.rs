//! The files: eviction, damage, death.
