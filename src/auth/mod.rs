//! Who is calling, and may they? PURE: what certificates, sockets and configurations say is given.
//!
//! `identity` is who calls, `grants` decides, `methods` says what each method asks for.
//!
//! 1. Without grants, everybody may do everything; with one of them, only what a grant allows.
//! 2. A method that is not in the table of `methods` is allowed to nobody.

#![warn(missing_docs)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod grants;
mod identity;
mod methods;

pub use grants::{AccountKind, Grants};
pub use identity::Identity;
pub use methods::{Requirement, requirement};
