//! Reads YAML into the structs of `sections`, and finds as many problems as it can in one pass.
//!
//! [`Positions`] knows where each key is, [`YamlValue`] tolerates duplicate keys, and [`Reader`] collects problems.
//! Values never appear in a message, because a secret may have been written at the wrong key.

mod deserializer;
mod forms;
mod positions;
mod reader;
mod section;
mod value;

pub(super) use self::forms::{
    Count, DurationText, OneOrMany, OrOff, RateText, Scalar, Shorthand, Size, WordOrMap, scalar,
};
pub(super) use self::positions::Positions;
pub(super) use self::reader::{Reader, syntax_error};
pub(super) use self::section::{Section, seconds};
pub(super) use self::value::YamlValue;
