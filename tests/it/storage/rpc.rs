//! Each call, its good and bad inputs.
