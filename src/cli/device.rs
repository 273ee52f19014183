//! What `--device` names. Separate because a device across the network is named by a secret, which
//! must not show in messages, and may come from a file or from the environment.

use std::fmt;
use std::str::FromStr;

use crate::error::Result;
use crate::remote::url::PairingUrl;

/// Where the tensors are and the kernels run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceSpec {
    /// What `TINY_SD_DEVICE` says, else the best one that is here.
    Auto,
    /// This machine's processor.
    Cpu,
    /// A worker inside of this process, reached over the loopback network.
    Mock,
    /// A worker elsewhere.
    Remote(Box<PairingUrl>),
}

impl DeviceSpec {
    /// Never [`DeviceSpec::Auto`].
    ///
    /// # Errors
    /// If the environment names no device.
    pub fn resolve(&self) -> Result<Self> {
        match self {
            DeviceSpec::Auto => match PairingUrl::environment_argument() {
                Some(argument) => match argument.parse::<Self>() {
                    Ok(DeviceSpec::Auto) => Ok(DeviceSpec::Cpu),
                    Ok(device) => Ok(device),
                    Err(message) => Err(crate::Error::usage(format!("TINY_SD_DEVICE: {message}"))),
                },
                None => Ok(DeviceSpec::Cpu),
            },
            device => Ok(device.clone()),
        }
    }
}

impl FromStr for DeviceSpec {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(DeviceSpec::Auto),
            "cpu" => Ok(DeviceSpec::Cpu),
            "mock" => Ok(DeviceSpec::Mock),
            text if text.starts_with('@') || text.contains("://") => {
                let url = PairingUrl::from_argument(text).map_err(|error| error.to_string())?;
                Ok(DeviceSpec::Remote(Box::new(url)))
            }
            _ => Err("one of auto, cpu, mock, quic://… or @FILE with such a URL".into()),
        }
    }
}

/// Without the token.
impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceSpec::Auto => f.write_str("auto"),
            DeviceSpec::Cpu => f.write_str("cpu"),
            DeviceSpec::Mock => f.write_str("mock"),
            DeviceSpec::Remote(url) => write!(f, "quic://{}", url.name()),
        }
    }
}
