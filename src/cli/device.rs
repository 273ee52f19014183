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
    /// An NVIDIA GPU of this machine, by its number.
    Cuda(usize),
    /// A worker inside of this process, reached over the loopback network.
    Mock,
    /// A worker elsewhere.
    Remote(Box<PairingUrl>),
}

/// The stages of a pipeline, as `--device` names them.
const STAGES: [&str; 3] = ["text", "unet", "vae"];

/// Where each stage is computed: on one device, or `text=DEVICE,unet=DEVICE,vae=DEVICE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DevicePlan {
    /// Of the text encoder, the UNet and the VAE, in this order.
    pub stages: [DeviceSpec; 3],
}

impl DevicePlan {
    /// All on one device.
    pub fn whole(device: DeviceSpec) -> Self {
        Self { stages: std::array::from_fn(|_| device.clone()) }
    }

    /// The same without [`DeviceSpec::Auto`].
    ///
    /// # Errors
    /// If the environment names no device.
    pub fn resolve(&self) -> Result<Self> {
        if !self.stages.contains(&DeviceSpec::Auto) {
            return Ok(self.clone());
        }
        let environment = match PairingUrl::environment_argument() {
            Some(argument) => argument
                .parse::<Self>()
                .map_err(|message| crate::Error::usage(format!("TINY_SD_DEVICE: {message}")))?,
            None => Self::whole(DeviceSpec::Auto),
        };
        let mut stages = self.stages.clone();
        for (stage, default) in stages.iter_mut().zip(environment.stages) {
            if *stage == DeviceSpec::Auto {
                *stage = if default == DeviceSpec::Auto { DeviceSpec::Cpu } else { default };
            }
        }
        Ok(Self { stages })
    }
}

impl FromStr for DevicePlan {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let stage_of = |part: &str| -> Option<(usize, usize)> {
            let place = STAGES.iter().position(|stage| {
                part.strip_prefix(stage).is_some_and(|rest| rest.starts_with('='))
            })?;
            Some((place, part.find('=')? + 1))
        };
        if stage_of(text).is_none() {
            return text.parse().map(Self::whole);
        }
        // A comma in a file's name is no separator.
        let mut parts: Vec<String> = Vec::new();
        for part in text.split(',') {
            match parts.last_mut().filter(|_| stage_of(part).is_none()) {
                Some(last) => last.extend([",", part]),
                None => parts.push(part.to_owned()),
            }
        }
        let mut stages: [Option<DeviceSpec>; 3] = [None, None, None];
        for part in &parts {
            let Some((place, start)) = stage_of(part) else { continue };
            let device = part.get(start..).unwrap_or_default().parse()?;
            if let Some(stage) = stages.get_mut(place)
                && stage.replace(device).is_some()
            {
                return Err(format!("{} has two devices", STAGES.get(place).unwrap_or(&"")));
            }
        }
        Ok(Self { stages: stages.map(|stage| stage.unwrap_or(DeviceSpec::Auto)) })
    }
}

/// Without tokens.
impl fmt::Display for DevicePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [text, unet, vae] = &self.stages;
        match text == unet && unet == vae {
            true => text.fmt(f),
            false => write!(f, "text={text},unet={unet},vae={vae}"),
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
            text if text == "cuda" || text.starts_with("cuda:") => {
                Ok(DeviceSpec::Cuda(cuda_ordinal(text)?))
            }
            text if text.starts_with('@') || text.contains("://") => {
                let url = PairingUrl::from_argument(text).map_err(|error| error.to_string())?;
                Ok(DeviceSpec::Remote(Box::new(url)))
            }
            _ => Err("one of auto, cpu, cuda, cuda:N, mock, quic://… or @FILE with such a URL, \
                      for all or as text=…,unet=…,vae=…"
                .into()),
        }
    }
}

/// The number of a GPU: `cuda` is the first one, `cuda:1` the second.
///
/// # Errors
/// If it is written otherwise.
pub(super) fn cuda_ordinal(text: &str) -> std::result::Result<usize, String> {
    let number = match text.strip_prefix("cuda") {
        Some("") => Some(0),
        Some(rest) => rest.strip_prefix(':').and_then(|number| number.parse::<u8>().ok()),
        None => None,
    };
    let number = number.ok_or_else(|| format!("{text:?} names no GPU: cuda, cuda:0, cuda:1, …"));
    number.map(usize::from)
}

/// Without the token.
impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceSpec::Auto => f.write_str("auto"),
            DeviceSpec::Cpu => f.write_str("cpu"),
            DeviceSpec::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            DeviceSpec::Mock => f.write_str("mock"),
            DeviceSpec::Remote(url) => write!(f, "quic://{}", url.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_placed_one_by_one_or_all_together() {
        let check = |text: &str, expected: &str| {
            let found = text.parse::<DevicePlan>();
            assert_eq!(found.map_or_else(|error| error, |plan| plan.to_string()), expected);
        };
        check("cpu", "cpu");
        check("cuda", "cuda:0");
        check("text=cpu,unet=cuda:1,vae=cuda", "text=cpu,unet=cuda:1,vae=cuda:0");
        check("cuda:x", "\"cuda:x\" names no GPU: cuda, cuda:0, cuda:1, …");
        check("cuda:256", "\"cuda:256\" names no GPU: cuda, cuda:0, cuda:1, …");
        check("text=cpu,unet=mock,vae=mock", "text=cpu,unet=mock,vae=mock");
        check("vae=cpu,text=cpu,unet=cpu", "cpu");
        check("unet=mock", "text=auto,unet=mock,vae=auto");
        check("unet=mock,unet=cpu", "unet has two devices");
        for text in ["text=gpu", "text=cpu,,", "text=", "cpu,unet=mock", "text", "clip=cpu"] {
            let error = text.parse::<DevicePlan>().unwrap_err();
            assert!(error.contains("one of auto, cpu"), "{text}: {error}");
        }
    }

    #[test]
    fn a_url_and_a_comma_in_a_files_name_stay_whole() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("quic://{}@host:1?cert={}", "0".repeat(64), "0".repeat(64));
        let file = folder.path().join("a,b.txt");
        std::fs::write(&file, &url).unwrap();
        let text = format!("text=cpu,unet=@{},vae={url}", file.display());
        let plan = text.parse::<DevicePlan>().unwrap();
        assert_eq!(plan.to_string(), "text=cpu,unet=quic://host:1,vae=quic://host:1");
    }
}
