//! Reading of JSON documents from ZooKeeper: the members that are needed, each on its own, so that
//! a value of an unexpected type affects that member only. All other members are skipped without
//! being kept in memory.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::excerpt::Excerpt;

/// Why the content of a znode cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EntryError {
    /// The content is not JSON, or has a member twice.
    #[error("invalid JSON: {0}")]
    Json(String),
    /// The content, or the member `key`, is JSON but not an object.
    #[error("{0} is not a JSON object")]
    NotAnObject(&'static str),
    /// A required member is missing, or its value has another type or is out of range.
    #[error("{key} is missing or not {expected}")]
    Required { key: &'static str, expected: &'static str },
    /// A member has a value of another type or out of range.
    #[error("{key} has an invalid value: {value}")]
    Invalid { key: &'static str, value: Excerpt },
}

/// Reads the JSON object `json`, called `name` in errors.
///
/// The members of `T` should be [`Field`]s or `Option<&RawValue>`, so that a value of another type
/// is not an error of the whole document.
pub(super) fn object<'j, T: Deserialize<'j>>(
    name: &'static str,
    json: &'j [u8],
) -> Result<T, EntryError> {
    // serde would accept an array as the members of `T` in their order.
    match json.trim_ascii_start().first() {
        None | Some(b'{') => {
            serde_json::from_slice(json).map_err(|error| EntryError::Json(error.to_string()))
        }
        Some(_) => Err(EntryError::NotAnObject(name)),
    }
}

/// A member of a JSON object.
#[derive(Default)]
pub(super) enum Field<T> {
    /// It is not there, or null.
    #[default]
    Missing,
    Value(T),
    /// It has another type.
    Invalid(Excerpt),
}

impl<T> Field<T> {
    /// The value. Ignores one of another type.
    pub(super) fn lenient(self) -> Option<T> {
        match self {
            Self::Value(value) => Some(value),
            Self::Missing | Self::Invalid(_) => None,
        }
    }

    /// The value, if there is one.
    ///
    /// # Errors
    /// The value has another type.
    pub(super) fn strict(self, key: &'static str) -> Result<Option<T>, EntryError> {
        match self {
            Self::Missing => Ok(None),
            Self::Value(value) => Ok(Some(value)),
            Self::Invalid(value) => Err(EntryError::Invalid { key, value }),
        }
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Field<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let json = <&RawValue>::deserialize(deserializer)?.get();
        Ok(match serde_json::from_str(json) {
            Ok(Some(value)) => Self::Value(value),
            Ok(None) => Self::Missing,
            Err(_) => Self::Invalid(Excerpt::new(json.as_bytes())),
        })
    }
}
