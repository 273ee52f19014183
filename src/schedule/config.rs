//! A model's `scheduler_config.json`, with the meaning that diffusers gives it. Separate because
//! it is the only place that sees JSON: what leaves it is a [`Scheduler`] whose settings are typed
//! and covered, or an error that names the field.

use std::fmt;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::{Scheduler, SchedulerChoice, SchedulerKind, SigmaSchedule};
use crate::{Error, Result};

/// A scheduler's configuration: the class that wrote it and what it sets.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    class_name: String,
    given: Map<String, Value>,
}

impl SchedulerConfig {
    /// Takes the configuration apart. Numbers that JSON does not have may be the strings
    /// "Infinity", "-Infinity" and "NaN".
    ///
    /// # Errors
    /// No JSON object, or no `_class_name`.
    pub fn parse(config: &Value) -> Result<Self> {
        let Value::Object(object) = config else {
            return Err(Error::model("scheduler_config.json: not a JSON object"));
        };
        let Some(Value::String(class_name)) = object.get("_class_name") else {
            return Err(Error::model("scheduler_config.json: _class_name is missing"));
        };
        // What its writer did not set itself is each class's own to fill.
        let defaulted = object.get("_use_default_values").and_then(Value::as_array);
        let is_default =
            |key: &str| defaulted.is_some_and(|keys| keys.iter().any(|name| name == key));
        let given = object
            .iter()
            .filter(|(key, _)| !key.starts_with('_') && !is_default(key))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        Ok(Self { class_name: class_name.clone(), given })
    }

    /// The scheduler that the configuration is for, none if it is not one of ours.
    pub fn choice(&self) -> Option<SchedulerChoice> {
        let algorithm_type = match self.given.get("algorithm_type") {
            None => "dpmsolver++",
            // The class takes it for its own.
            Some(name) if name == "deis" => "dpmsolver++",
            Some(name) => name.as_str().unwrap_or_default(),
        };
        let is_it = |kind: &SchedulerKind| {
            kind.info().algorithm_type.is_none_or(|own| own == algorithm_type)
        };
        let kind = self.kinds().find(is_it)?;
        Some(self.in_force(kind.into()))
    }

    /// What a choice comes to with this configuration, which spaces the sigmas where the choice
    /// does not: so is the [`Scheduler`]'s own choice.
    pub fn in_force(&self, choice: SchedulerChoice) -> SchedulerChoice {
        let is_set = |sigmas: &SigmaSchedule| {
            self.given.get(sigmas.field()).is_some_and(|value| *value == Value::Bool(true))
        };
        let sigmas = choice.sigmas().or_else(|| SigmaSchedule::ALL.into_iter().find(is_set));
        SchedulerChoice::new(choice.kind(), sigmas).unwrap_or(choice)
    }

    /// The schedulers that the class can be.
    fn kinds(&self) -> impl Iterator<Item = SchedulerKind> {
        let is_it = |kind: &SchedulerKind| kind.info().class_name == self.class_name;
        SchedulerKind::ALL.iter().copied().filter(is_it)
    }

    /// The configuration's own scheduler.
    ///
    /// # Errors
    /// A class that is not one of ours, or a field whose value is not covered, by name.
    pub fn scheduler(&self) -> Result<Scheduler> {
        // Where none fits, reading the configuration says why.
        let kind = self.choice().map(SchedulerChoice::kind).or_else(|| self.kinds().next());
        let Some(kind) = kind else {
            let known: Vec<&str> = SchedulerKind::ALL.iter().map(|kind| kind.name()).collect();
            return Err(Error::model(format!(
                "scheduler_config.json: {} is not supported; choose another with --scheduler {}",
                self.class_name,
                known.join("|")
            )));
        };
        self.read(kind.into())
    }

    /// Another scheduler with this configuration, as
    /// `pipe.scheduler = OtherScheduler.from_config(pipe.scheduler.config)` makes it: it takes
    /// over what the configuration sets and it knows, also what the configuration's own class
    /// does not know, and has its own defaults for the rest. The same scheduler is just itself.
    /// A choice of sigmas is what another argument of `from_config` is: `use_karras_sigmas=True`.
    ///
    /// # Errors
    /// A field whose value is not covered, by name.
    pub fn for_scheduler(&self, choice: SchedulerChoice) -> Result<Scheduler> {
        let mut config = self.clone();
        if let Some(algorithm_type) = choice.kind().info().algorithm_type {
            config.given.insert("algorithm_type".into(), algorithm_type.into());
        }
        if choice.sigmas().is_some() {
            for sigmas in SigmaSchedule::ALL {
                let is_chosen = choice.sigmas() == Some(sigmas);
                config.given.insert(sigmas.field().into(), is_chosen.into());
            }
        }
        config.read(choice)
    }

    fn read(&self, choice: SchedulerChoice) -> Result<Scheduler> {
        let kind = choice.kind();
        let class_name = kind.info().class_name;
        let mut given = self.given.clone();
        // StableDiffusionPipeline corrects its scheduler before anyone can switch.
        for (key, value) in [("steps_offset", Value::from(1)), ("clip_sample", Value::from(false))]
        {
            if given.contains_key(key) || self.class_name == class_name {
                given.insert(key.to_owned(), value);
            }
        }
        let fields = Fields { class_name, given };
        let num_train_timesteps = super::training::num_train_timesteps(&fields)?;
        // A flag that this configuration sets is part of the name.
        let choice = self.in_force(choice);
        Ok(Scheduler { choice, num_train_timesteps, settings: kind.read(&fields)? })
    }
}

/// The parameters of one class: each is what the configuration sets, or the default that diffusers
/// has in the signature of that class's `__init__`.
pub(super) struct Fields {
    class_name: &'static str,
    given: Map<String, Value>,
}

impl Fields {
    /// A true or false; Python takes null for false.
    pub(super) fn flag(&self, name: &str, default: bool) -> Result<bool> {
        match self.given.get(name) {
            None => Ok(default),
            Some(Value::Null) => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            Some(other) => Err(self.refuse(format!("{name} is {other}, not true or false"))),
        }
    }

    /// Whether a field is this name.
    pub(super) fn is(&self, name: &str, value: &str) -> bool {
        self.given.get(name).is_some_and(|given| given == value)
    }

    /// A number, finite or not.
    pub(super) fn number(&self, name: &str, default: f64) -> Result<f64> {
        self.given.get(name).map_or(Ok(default), |value| {
            number(value).ok_or_else(|| self.refuse(format!("{name} is {value}, not a number")))
        })
    }

    /// A number, none where it is null or missing.
    pub(super) fn optional_number(&self, name: &str) -> Result<Option<f64>> {
        match self.given.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(_) => self.number(name, 0.0).map(Some),
        }
    }

    /// A whole number in a range.
    pub(super) fn integer(
        &self,
        name: &str,
        default: i64,
        range: RangeInclusive<i64>,
    ) -> Result<i64> {
        let Some(value) = self.given.get(name) else { return Ok(default) };
        let whole = value.as_i64().filter(|whole| range.contains(whole));
        whole.ok_or_else(|| {
            let (least, most) = (range.start(), range.end());
            self.refuse(format!("{name} is {value}, not a whole number from {least} to {most}"))
        })
    }

    /// A list of numbers, none where it is null or missing.
    pub(super) fn numbers(&self, name: &str) -> Result<Option<Vec<f64>>> {
        let values = match self.given.get(name) {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Array(values)) => values.iter().map(number).collect::<Option<_>>(),
            Some(_) => None,
        };
        values.map(Some).ok_or_else(|| self.refuse(format!("{name} is not a list of numbers")))
    }

    /// One of the names that are covered.
    pub(super) fn choice<T: Copy>(&self, name: &str, default: T, known: &[(&str, T)]) -> Result<T> {
        let Some(value) = self.given.get(name) else { return Ok(default) };
        let found = known.iter().find(|(known, _)| value == known);
        found.map(|(_, meaning)| *meaning).ok_or_else(|| {
            let known: Vec<&str> = known.iter().map(|(known, _)| *known).collect();
            self.unsupported(name, value, &known.join(", "))
        })
    }

    /// As [`choice`](Self::choice), with null for the default.
    pub(super) fn choice_or_null<T: Copy>(
        &self,
        name: &str,
        default: T,
        known: &[(&str, T)],
    ) -> Result<T> {
        match self.given.get(name) {
            Some(Value::Null) => Ok(default),
            None | Some(_) => self.choice(name, default, known),
        }
    }

    /// Refuses a flag, missing or given, that must not be set.
    pub(super) fn must_be(&self, name: &str, default: bool, covered: bool) -> Result<()> {
        if self.flag(name, default)? == covered {
            return Ok(());
        }
        Err(self.unsupported(name, &!covered, &covered.to_string()))
    }

    /// Refuses a field, missing or given, that must not have a value.
    pub(super) fn must_be_null(&self, name: &str) -> Result<()> {
        match self.given.get(name) {
            None | Some(Value::Null) => Ok(()),
            Some(value) => Err(self.unsupported(name, value, "null")),
        }
    }

    /// Refuses certain values of a field that is otherwise without effect.
    pub(super) fn must_not_be(&self, name: &str, refused: &[&str]) -> Result<()> {
        match self.given.get(name) {
            Some(Value::String(value)) if refused.contains(&value.as_str()) => {
                Err(self.unsupported(name, value, "null"))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// An error about this configuration.
    pub(super) fn refuse(&self, message: String) -> Error {
        Error::model(message).context(format!("scheduler_config.json for {}", self.class_name))
    }

    fn unsupported(&self, name: &str, value: &dyn fmt::Display, covered: &str) -> Error {
        self.refuse(format!(
            "{name} {value} is not supported (supported: {covered}); try another --scheduler"
        ))
    }
}

fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(name) => match name.as_str() {
            "Infinity" => Some(f64::INFINITY),
            "-Infinity" => Some(f64::NEG_INFINITY),
            "NaN" => Some(f64::NAN),
            _ => None,
        },
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use serde_json::json;

    const DPM: &str = "DPMSolverMultistepScheduler";

    /// The configuration of a class, with changes.
    fn config(class_name: &str, changes: &Value) -> SchedulerConfig {
        let mut config = json!({
            "_class_name": class_name, "beta_start": 0.00085, "beta_end": 0.012,
            "beta_schedule": "scaled_linear", "skip_prk_steps": true, "steps_offset": 1,
        });
        for (key, value) in changes.as_object().expect("an object") {
            config[key] = value.clone();
        }
        SchedulerConfig::parse(&config).expect("an object with a class")
    }

    fn refusal<T>(result: Result<T>) -> String {
        let error = result.err().expect("an error");
        assert_eq!(error.kind(), Kind::Model, "{error}");
        error.to_string()
    }

    #[test]
    fn a_value_that_is_not_covered_is_refused_by_name() {
        for (class_name, field, value) in [
            (DPM, "thresholding", json!(true)),
            (DPM, "use_karras_sigmas", json!(1)),
            (DPM, "use_lu_lambdas", json!(true)),
            (DPM, "use_flow_sigmas", json!(true)),
            (DPM, "use_dynamic_shifting", json!(true)),
            (DPM, "algorithm_type", json!("dpmsolver")),
            (DPM, "solver_order", json!(4)),
            (DPM, "solver_order", json!(2.5)),
            (DPM, "solver_type", json!("rk4")),
            (DPM, "variance_type", json!("learned_range")),
            (DPM, "prediction_type", json!("flow_prediction")),
            (DPM, "final_sigmas_type", json!("one")),
            (DPM, "timestep_spacing", json!("karras")),
            (DPM, "lambda_min_clipped", json!("Infinity")),
            (DPM, "lambda_min_clipped", json!("NaN")),
            (DPM, "lambda_min_clipped", json!("low")),
            (DPM, "lower_order_final", json!("yes")),
            (DPM, "beta_schedule", json!("sigmoid")),
            (DPM, "beta_start", json!(null)),
            (DPM, "beta_start", json!(-1)),
            (DPM, "beta_end", json!(1e308)),
            (DPM, "trained_betas", json!([0.1, 0.2])),
            (DPM, "trained_betas", json!("many")),
            (DPM, "num_train_timesteps", json!(0)),
            (DPM, "num_train_timesteps", json!(1_000_000_000)),
            ("DDIMScheduler", "thresholding", json!(true)),
            ("PNDMScheduler", "prediction_type", json!("sample")),
            ("EulerDiscreteScheduler", "interpolation_type", json!("log_linear")),
            ("EulerDiscreteScheduler", "timestep_type", json!("continuous")),
            ("EulerAncestralDiscreteScheduler", "prediction_type", json!("sample")),
            ("KDPM2DiscreteScheduler", "prediction_type", json!("sample")),
            ("KDPM2AncestralDiscreteScheduler", "timestep_spacing", json!("even")),
            ("HeunDiscreteScheduler", "beta_schedule", json!("exp")),
            ("LMSDiscreteScheduler", "use_beta_sigmas", json!("yes")),
            ("DPMSolverSinglestepScheduler", "algorithm_type", json!("dpmsolver")),
            ("DEISMultistepScheduler", "use_flow_sigmas", json!(true)),
            ("UniPCMultistepScheduler", "solver_p", json!({})),
            ("UniPCMultistepScheduler", "solver_order", json!(4)),
            ("DDPMScheduler", "variance_type", json!("learned_range")),
            ("DDPMScheduler", "thresholding", json!(true)),
            ("LCMScheduler", "thresholding", json!(true)),
            ("TCDScheduler", "original_inference_steps", json!(1001)),
        ] {
            let message = refusal(config(class_name, &json!({ field: value })).scheduler());
            assert!(message.contains(field) && message.contains(class_name), "{message}");
        }
    }

    #[test]
    fn what_another_class_does_not_know_does_not_stop_it() {
        let odd = json!({ "interpolation_type": "log_linear", "thresholding": true });
        let odd = config(DPM, &odd);
        assert!(odd.for_scheduler(SchedulerKind::Pndm.into()).is_ok());
        assert!(odd.for_scheduler(SchedulerKind::EulerAncestral.into()).is_ok());
        let message = refusal(odd.for_scheduler(SchedulerKind::Euler.into()));
        assert!(message.contains("interpolation_type"), "{message}");
    }

    #[test]
    fn a_name_is_what_the_configuration_makes_of_a_class() {
        let check = |class_name: &str, changes: &Value, own: &str, chosen: &str, result: &str| {
            let config = config(class_name, changes);
            assert_eq!(config.scheduler().unwrap().choice().to_string(), own);
            let choice = SchedulerChoice::parse(chosen).unwrap();
            let scheduler = config.for_scheduler(choice).unwrap();
            assert_eq!(scheduler.choice().to_string(), result, "{class_name} {chosen}");
            assert_eq!(config.in_force(choice), scheduler.choice(), "{class_name} {chosen}");
        };
        let none = json!({});
        let karras = json!({ "use_karras_sigmas": true });
        let sde = json!({ "algorithm_type": "sde-dpmsolver++", "use_beta_sigmas": true });
        check(DPM, &none, "dpm++2m", "euler", "euler");
        check(DPM, &sde, "dpm++2m-sde-beta", "dpm++2m", "dpm++2m-beta");
        // It takes over what the configuration sets, as from_config does, but for what is named.
        check(DPM, &karras, "dpm++2m-karras", "euler", "euler-karras");
        check(DPM, &karras, "dpm++2m-karras", "euler-a", "euler-a");
        check(DPM, &karras, "dpm++2m-karras", "dpm++2m-sde-beta", "dpm++2m-sde-beta");
    }

    #[test]
    fn two_spacings_of_sigmas_at_once_are_refused() {
        let both = json!({ "use_karras_sigmas": true, "use_beta_sigmas": true });
        let message = refusal(config(DPM, &both).scheduler());
        assert!(message.contains("use_karras_sigmas and use_beta_sigmas are both"), "{message}");
    }

    #[test]
    fn ddim_made_from_a_configuration_without_clip_sample_would_clip() {
        let open = config("PNDMScheduler", &json!({}));
        assert!(
            refusal(open.for_scheduler(SchedulerKind::Ddim.into())).contains("clip_sample true")
        );
        let set = config("PNDMScheduler", &json!({ "clip_sample": false }));
        assert!(set.for_scheduler(SchedulerKind::Ddim.into()).is_ok());
    }

    #[test]
    fn a_class_of_another_table_can_lend_its_configuration() {
        let other = config("IPNDMScheduler", &json!({}));
        assert_eq!(other.choice(), None);
        let message = refusal(other.scheduler());
        assert!(message.contains("IPNDMScheduler") && message.contains("--scheduler"));
        assert!(other.for_scheduler(SchedulerKind::Euler.into()).is_ok());
    }

    #[test]
    fn something_else_than_a_scheduler_configuration_is_refused() {
        for other in [json!([1]), json!({}), json!({ "_class_name": 1 })] {
            refusal(SchedulerConfig::parse(&other));
        }
    }

    #[test]
    fn a_number_of_steps_that_cannot_be_is_a_usage_error() {
        for (kind, changes, steps) in [
            (SchedulerKind::Euler, json!({}), 0),
            (SchedulerKind::Euler, json!({}), 1001),
            (SchedulerKind::Ddim, json!({ "num_train_timesteps": 20 }), 21),
            (SchedulerKind::Pndm, json!({ "skip_prk_steps": false }), 3),
            // timestep 1000, by the offset
            (SchedulerKind::Ddim, json!({}), 1000),
            (SchedulerKind::Lcm, json!({}), 51),
            (SchedulerKind::Tcd, json!({ "original_inference_steps": 20 }), 21),
            (SchedulerKind::DpmSolverMultistep, json!({ "timestep_spacing": "leading" }), 1000),
            // no original in the first sample, and a model that predicts the noise
            (
                SchedulerKind::Ddim,
                json!({
                    "rescale_betas_zero_snr": true, "timestep_spacing": "trailing",
                }),
                5,
            ),
        ] {
            let error = config(kind.info().class_name, &changes)
                .scheduler()
                .expect("covered")
                .plan(steps)
                .expect_err(kind.name());
            assert_eq!(error.kind(), Kind::Usage, "{error}");
            assert!(error.to_string().contains("steps"), "{error}");
        }
    }

    #[test]
    fn every_number_of_steps_gives_a_plan_or_an_error() {
        for kind in SchedulerKind::ALL {
            for spacing in ["leading", "trailing", "linspace"] {
                let config =
                    config(kind.info().class_name, &json!({ "timestep_spacing": spacing }));
                let scheduler = config.scheduler().expect(spacing);
                let most = match kind {
                    SchedulerKind::Lcm | SchedulerKind::Tcd => 50,
                    _ => 499,
                };
                let counts = (1..=100).chain((101..=1000).step_by(37)).chain([499, 500, 999, 1000]);
                let refused: Vec<usize> =
                    counts.filter(|steps| scheduler.plan(*steps).is_err()).collect();
                let least = refused.iter().copied().min().unwrap_or(1001);
                assert!(least > most, "{} {spacing} refuses {refused:?}", kind.name());
            }
        }
    }
}
