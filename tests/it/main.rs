//! The one integration binary.

mod architecture;
mod documents;
mod wire;
