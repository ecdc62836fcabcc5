//! From TOML values to a configuration, with errors that keep their facts.
//!
//! serde's own messages name Rust's types; a `ValueError` says which key is at fault and how, and `error_message`
//! makes a sentence of it.

use std::fmt::Display;

use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error, Expected, IntoDeserializer, MapAccess,
    SeqAccess, Unexpected, VariantAccess, Visitor,
};
use toml::Value;

/// One step from a table or an array to what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum PathStep {
    Key(String),
    Index(usize),
}

/// Why a value is not what its key takes.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ValueError {
    /// From the top of the file to the value, or to the unknown key.
    pub path: Vec<PathStep>,
    pub kind: ValueErrorKind,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum ValueErrorKind {
    /// The last step of the path is no key of its section; these are.
    UnknownKey(&'static [&'static str]),
    /// A string that is none of these.
    UnknownVariant {
        word: String,
        known: &'static [&'static str],
    },
    /// A value of another type: what it is, and what is wanted.
    Type { found: String, wanted: ExpectedType },
    /// A value of the right type that cannot be parsed.
    Value(String),
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum ExpectedType {
    Boolean,
    /// From the least to the greatest one.
    Integer(i64, i64),
    Number,
    Text,
    List,
    Section,
    Other(String),
}

impl ValueError {
    fn new(kind: ValueErrorKind) -> Self {
        ValueError {
            path: Vec::new(),
            kind,
        }
    }

    fn below(mut self, step: PathStep) -> Self {
        self.path.insert(0, step);
        self
    }
}

/// Reads one configuration, or says what is wrong with it first.
pub(super) fn parse<T: serde::de::DeserializeOwned>(table: &toml::Table) -> Result<T, ValueError> {
    T::deserialize(ValueDeserializer(&Value::Table(table.clone())))
}

impl Display for ValueError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.kind)
    }
}

impl std::error::Error for ValueError {}

impl Error for ValueError {
    fn custom<T: Display>(message: T) -> Self {
        ValueError::new(ValueErrorKind::Value(message.to_string()))
    }

    fn invalid_type(found: Unexpected<'_>, wanted: &dyn Expected) -> Self {
        let found = match found {
            Unexpected::Bool(value) => value.to_string(),
            Unexpected::Unsigned(value) => format!("the number {value}"),
            Unexpected::Signed(value) => format!("the number {value}"),
            Unexpected::Float(value) => format!("the number {value}"),
            Unexpected::Str(text) => format!("the text {text:?}"),
            Unexpected::Seq => "a list".to_owned(),
            Unexpected::Map => "a section".to_owned(),
            other => other.to_string(),
        };
        let wanted = wanted.to_string();
        let wanted = match wanted.contains("nonzero") {
            true => ExpectedType::Integer(1, i64::MAX),
            false => ExpectedType::Other(wanted),
        };
        ValueError::new(ValueErrorKind::Type { found, wanted })
    }

    fn invalid_value(found: Unexpected<'_>, wanted: &dyn Expected) -> Self {
        Self::invalid_type(found, wanted)
    }

    fn unknown_variant(word: &str, known: &'static [&'static str]) -> Self {
        ValueError::new(ValueErrorKind::UnknownVariant {
            word: word.to_owned(),
            known,
        })
    }

    fn unknown_field(name: &str, known: &'static [&'static str]) -> Self {
        ValueError::new(ValueErrorKind::UnknownKey(known)).below(PathStep::Key(name.to_owned()))
    }
}

struct ValueDeserializer<'v>(&'v Value);

impl ValueDeserializer<'_> {
    fn type_error(&self, wanted: ExpectedType) -> ValueError {
        let found = match self.0 {
            Value::String(text) => format!("the text {text:?}"),
            Value::Integer(number) => format!("the number {number}"),
            Value::Float(number) => format!("the number {number}"),
            Value::Boolean(value) => value.to_string(),
            Value::Datetime(_) => "a date".to_owned(),
            Value::Array(items) if items.iter().all(Value::is_table) && !items.is_empty() => {
                "a list of sections".to_owned()
            }
            Value::Array(_) => "a list".to_owned(),
            Value::Table(_) => "a section".to_owned(),
        };
        ValueError::new(ValueErrorKind::Type { found, wanted })
    }
}

macro_rules! integer {
    ($($method:ident: $type:ty => $visit:ident;)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
            let least = i64::try_from(<$type>::MIN).unwrap_or(i64::MIN);
            let greatest = i64::try_from(<$type>::MAX).unwrap_or(i64::MAX);
            let fits = |number: i64| (least..=greatest).contains(&number);
            match self.0 {
                Value::Integer(number) if fits(*number) => visitor.$visit(*number as $type),
                _ => Err(self.type_error(ExpectedType::Integer(least, greatest))),
            }
        }
    )*};
}

impl<'de> Deserializer<'de> for ValueDeserializer<'_> {
    type Error = ValueError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self.0 {
            Value::String(text) => visitor.visit_str(text),
            Value::Integer(number) => visitor.visit_i64(*number),
            Value::Float(number) => visitor.visit_f64(*number),
            Value::Boolean(value) => visitor.visit_bool(*value),
            Value::Datetime(_) => Err(ValueError::invalid_type(
                Unexpected::Other("a date"),
                &visitor,
            )),
            Value::Array(items) => visitor.visit_seq(ArrayAccess(items.iter().enumerate())),
            Value::Table(table) => visitor.visit_map(TableAccess {
                entries: table.iter(),
                value: None,
            }),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self.0 {
            Value::Boolean(value) => visitor.visit_bool(*value),
            _ => Err(self.type_error(ExpectedType::Boolean)),
        }
    }

    integer! {
        deserialize_i8: i8 => visit_i8;
        deserialize_i16: i16 => visit_i16;
        deserialize_i32: i32 => visit_i32;
        deserialize_i64: i64 => visit_i64;
        deserialize_u8: u8 => visit_u8;
        deserialize_u16: u16 => visit_u16;
        deserialize_u32: u32 => visit_u32;
        deserialize_u64: u64 => visit_u64;
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        self.deserialize_f64(visitor)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self.0 {
            Value::Float(number) => visitor.visit_f64(*number),
            Value::Integer(number) => visitor.visit_i64(*number),
            _ => Err(self.type_error(ExpectedType::Number)),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self.0 {
            Value::String(text) => visitor.visit_str(text),
            _ => Err(self.type_error(ExpectedType::Text)),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self.0 {
            Value::Array(_) => self.deserialize_any(visitor),
            _ => Err(self.type_error(ExpectedType::List)),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self.0 {
            Value::Table(_) => self.deserialize_any(visitor),
            _ => Err(self.type_error(ExpectedType::Section)),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        self.deserialize_map(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        match self.0 {
            Value::String(word) => visitor.visit_enum(VariantName(word)),
            _ => Err(self.type_error(ExpectedType::Other(crate::text::one_of(variants)))),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        visitor.visit_newtype_struct(self)
    }

    serde::forward_to_deserialize_any! {
        i128 u128 char bytes byte_buf unit unit_struct tuple tuple_struct identifier ignored_any
    }
}

struct ArrayAccess<'v>(std::iter::Enumerate<std::slice::Iter<'v, Value>>);

impl<'de> SeqAccess<'de> for ArrayAccess<'_> {
    type Error = ValueError;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, ValueError> {
        let Some((index, item)) = self.0.next() else {
            return Ok(None);
        };
        seed.deserialize(ValueDeserializer(item))
            .map(Some)
            .map_err(|fault| fault.below(PathStep::Index(index)))
    }
}

struct TableAccess<'v> {
    entries: toml::map::Iter<'v, String, Value>,
    value: Option<(&'v String, &'v Value)>,
}

impl<'de> MapAccess<'de> for TableAccess<'_> {
    type Error = ValueError;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, ValueError> {
        self.value = self.entries.next();
        self.value
            .map(|(key, _)| seed.deserialize(key.as_str().into_deserializer()))
            .transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(
        &mut self,
        seed: V,
    ) -> Result<V::Value, ValueError> {
        let Some((key, value)) = self.value.take() else {
            return Err(ValueError::custom("a value was asked for before its key"));
        };
        seed.deserialize(ValueDeserializer(value))
            .map_err(|fault| fault.below(PathStep::Key(key.clone())))
    }
}

struct VariantName<'v>(&'v str);

impl<'de> EnumAccess<'de> for VariantName<'_> {
    type Error = ValueError;
    type Variant = UnitVariant;

    fn variant_seed<V: DeserializeSeed<'de>>(
        self,
        seed: V,
    ) -> Result<(V::Value, UnitVariant), ValueError> {
        seed.deserialize(self.0.into_deserializer())
            .map(|variant| (variant, UnitVariant))
    }
}

/// A variant without content, the only kind that a string can be.
struct UnitVariant;

impl<'de> VariantAccess<'de> for UnitVariant {
    type Error = ValueError;

    fn unit_variant(self) -> Result<(), ValueError> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, _: T) -> Result<T::Value, ValueError> {
        Err(ValueError::custom("a text is not enough here"))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, ValueError> {
        Err(ValueError::custom("a text is not enough here"))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, ValueError> {
        Err(ValueError::custom("a text is not enough here"))
    }
}
