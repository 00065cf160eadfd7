//! A YAML value that tolerates duplicate keys.
//!
//! `serde_yaml::Value` stops at a duplicate key, which would hide all later problems. Here the first of two values is
//! retained; `positions` reports the duplicate.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_yaml::{Mapping, Value};

/// A value in which each key is unique.
pub(in crate::config) struct YamlValue(pub(in crate::config) Value);

impl<'de> Deserialize<'de> for YamlValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor).map(Self)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value without a YAML tag")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(YamlValue(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::Sequence(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Mapping::new();
        while let Some((YamlValue(key), YamlValue(value))) = entries.next_entry()? {
            // The first one of duplicate keys is retained.
            map.entry(key).or_insert(value);
        }
        Ok(Value::Mapping(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_of_duplicate_keys_is_retained() {
        let YamlValue(value) = serde_yaml::from_str("{a: 1, b: 2, a: 3}").unwrap();
        assert_eq!(value, serde_yaml::from_str::<Value>("{a: 1, b: 2}").unwrap());
    }

    #[test]
    fn tagged_value_is_refused() {
        assert!(serde_yaml::from_str::<YamlValue>("a: !x y").is_err());
    }
}
