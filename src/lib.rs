pub mod digest;
pub mod instance;
pub mod path;
pub mod proto;
pub mod resource;
