//! What can be wrong with a picture.

/// Why a picture could not be decoded. `Display` says it in words, without the file's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("there is no such file")]
    Missing,
    #[error("it can't be read: {0}")]
    Unreadable(String),
    #[error("it is empty")]
    Empty,
    #[error("it is not an image")]
    NotAnImage,
    #[error("its data are corrupt: {0}")]
    Corrupt(String),
    #[error("it is truncated: {0}")]
    Truncated(String),
    #[error("it is {0}, which is not decoded here")]
    Unsupported(String),
    #[error("it is too large: {0}")]
    TooLarge(String),
}

impl Error {
    /// The short name that Python sees.
    pub fn kind(&self) -> &'static str {
        match self {
            Error::Missing => "missing",
            Error::Unreadable(_) => "unreadable",
            Error::Empty => "empty",
            Error::NotAnImage => "not_an_image",
            Error::Corrupt(_) => "corrupt",
            Error::Truncated(_) => "truncated",
            Error::Unsupported(_) => "unsupported",
            Error::TooLarge(_) => "too_large",
        }
    }
}

pub type Result<T> = std::result::Result<T, Error>;
