//! A model's `scheduler_config.json`, with the meaning that diffusers gives it. Separate because
//! it is the only place that sees JSON: what leaves it is a [`Scheduler`] whose settings are typed
//! and covered, or an error that names the field.

use std::fmt;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::{Scheduler, SchedulerKind};
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
    pub fn kind(&self) -> Option<SchedulerKind> {
        SchedulerKind::ALL.iter().copied().find(|kind| kind.class_name() == self.class_name)
    }

    /// The configuration's own scheduler.
    ///
    /// # Errors
    /// A class that is not one of ours, or a field whose value is not covered, by name.
    pub fn scheduler(&self) -> Result<Scheduler> {
        let Some(kind) = self.kind() else {
            let known: Vec<&str> = SchedulerKind::ALL.iter().map(|kind| kind.name()).collect();
            return Err(Error::model(format!(
                "scheduler_config.json: {} is not supported; choose another with --scheduler {}",
                self.class_name,
                known.join("|")
            )));
        };
        self.for_scheduler(kind)
    }

    /// Another scheduler with this configuration, as
    /// `pipe.scheduler = OtherScheduler.from_config(pipe.scheduler.config)` makes it: it takes
    /// over what the configuration sets and it knows, also what the configuration's own class
    /// does not know, and has its own defaults for the rest. The same scheduler is just itself.
    ///
    /// # Errors
    /// A field whose value is not covered, by name.
    pub fn for_scheduler(&self, kind: SchedulerKind) -> Result<Scheduler> {
        let mut given = self.given.clone();
        // StableDiffusionPipeline corrects its scheduler before anyone can switch.
        for (key, value) in [("steps_offset", Value::from(1)), ("clip_sample", Value::from(false))]
        {
            if given.contains_key(key) || self.kind() == Some(kind) {
                given.insert(key.to_owned(), value);
            }
        }
        let fields = Fields { class_name: kind.class_name(), given };
        let num_train_timesteps = super::training::num_train_timesteps(&fields)?;
        Ok(Scheduler { kind, num_train_timesteps, settings: kind.read(&fields)? })
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

    /// A number, finite or not.
    pub(super) fn number(&self, name: &str, default: f64) -> Result<f64> {
        self.given.get(name).map_or(Ok(default), |value| {
            number(value).ok_or_else(|| self.refuse(format!("{name} is {value}, not a number")))
        })
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

    /// Refuses a flag, missing or given, that must not be set.
    pub(super) fn must_be(&self, name: &str, default: bool, covered: bool) -> Result<()> {
        if self.flag(name, default)? == covered {
            return Ok(());
        }
        Err(self.unsupported(name, &!covered, &covered.to_string()))
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
            (DPM, "use_karras_sigmas", json!(true)),
            (DPM, "use_exponential_sigmas", json!(true)),
            (DPM, "use_beta_sigmas", json!(true)),
            (DPM, "use_lu_lambdas", json!(true)),
            (DPM, "use_flow_sigmas", json!(true)),
            (DPM, "use_dynamic_shifting", json!(true)),
            (DPM, "algorithm_type", json!("sde-dpmsolver++")),
            (DPM, "algorithm_type", json!("deis")),
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
            ("EulerDiscreteScheduler", "use_karras_sigmas", json!(true)),
            ("EulerDiscreteScheduler", "interpolation_type", json!("log_linear")),
            ("EulerDiscreteScheduler", "timestep_type", json!("continuous")),
            ("EulerAncestralDiscreteScheduler", "prediction_type", json!("sample")),
        ] {
            let message = refusal(config(class_name, &json!({ field: value })).scheduler());
            assert!(message.contains(field) && message.contains(class_name), "{message}");
        }
    }

    #[test]
    fn what_another_class_does_not_know_does_not_stop_it() {
        let karras = config(DPM, &json!({ "use_karras_sigmas": true, "thresholding": true }));
        assert!(karras.for_scheduler(SchedulerKind::Pndm).is_ok());
        assert!(karras.for_scheduler(SchedulerKind::EulerAncestral).is_ok());
        assert!(refusal(karras.for_scheduler(SchedulerKind::Euler)).contains("use_karras_sigmas"));
    }

    #[test]
    fn ddim_made_from_a_configuration_without_clip_sample_would_clip() {
        let open = config("PNDMScheduler", &json!({}));
        assert!(refusal(open.for_scheduler(SchedulerKind::Ddim)).contains("clip_sample true"));
        let set = config("PNDMScheduler", &json!({ "clip_sample": false }));
        assert!(set.for_scheduler(SchedulerKind::Ddim).is_ok());
    }

    #[test]
    fn a_class_of_another_table_can_lend_its_configuration() {
        let lms = config("LMSDiscreteScheduler", &json!({}));
        assert_eq!(lms.kind(), None);
        let message = refusal(lms.scheduler());
        assert!(message.contains("LMSDiscreteScheduler") && message.contains("--scheduler"));
        assert!(lms.for_scheduler(SchedulerKind::Euler).is_ok());
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
            let error = config(kind.class_name(), &changes)
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
                let config = config(kind.class_name(), &json!({ "timestep_spacing": spacing }));
                let scheduler = config.scheduler().expect(spacing);
                let refused = (1..=1000).filter(|steps| scheduler.plan(*steps).is_err());
                let refused: Vec<usize> = refused.collect();
                let least = refused.first().copied().unwrap_or(1001);
                assert!(least > 500, "{} {spacing} refuses {refused:?}", kind.name());
            }
        }
    }
}
