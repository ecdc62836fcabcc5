#![doc = include_str!("ARCHITECTURE.md")]

// Words.
pub mod digest;
pub mod instance;
pub mod metadata;
pub mod path;
pub mod proto;
pub mod resource;
pub mod text;

// Services.
pub mod auth;
pub mod config;
pub mod daemon;
pub mod storage;

// Daemons.
pub mod runner;
pub mod scheduler;
pub mod worker;
