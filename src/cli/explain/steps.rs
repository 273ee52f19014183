//! What the scheduler does. Separate because it needs the scheduler's configuration and nothing
//! else of a model.

use serde_json::{Value, json};

use super::{Here, Said};
use crate::cli::inputs::ImageRequest;
use crate::cli::job::Job;
use crate::error::Result;
use crate::schedule::{Blend, Plan, Scheduler, SchedulerConfig};

/// The number of evaluations of a picture, where the model is here.
pub(super) fn say(job: &Job, here: Option<&Here>, said: &mut Said) -> Result<Option<usize>> {
    let (steps, scale) = (job.steps.get(), job.guidance_scale.get());
    let evaluations = match here {
        Some(here) => {
            let config = SchedulerConfig::parse(&here.model.scheduler_config()?)?;
            let scheduler = job.schedule(&config)?;
            let whose = if job.scheduler.is_none() { ", the model's own" } else { "" };
            said.line("scheduler", format!("{}{whose}", scheduler.choice()));
            said.field("scheduler", scheduler.choice().to_string());
            Some(plan(job, &scheduler, said)?)
        }
        None => {
            let chosen = job.scheduler.map(|choice| choice.to_string());
            let shown = chosen.as_deref().unwrap_or("the model's own");
            said.line("scheduler", format!("{shown}, whose timesteps the model's files say"));
            said.field("scheduler", chosen);
            said.line("steps", steps);
            said.field("timesteps", Value::Null);
            said.field("sigmas", Value::Null);
            None
        }
    };
    let is_guided = job.guidance_scale.needs_unconditional();
    let shown = if is_guided { "" } else { ": no pass without the prompt" };
    said.line("guidance scale", format!("{scale}{shown}"));
    said.field("steps", steps);
    said.field("guidance_scale", scale);
    Ok(evaluations)
}

fn plan(job: &Job, scheduler: &Scheduler, said: &mut Said) -> Result<usize> {
    let steps = job.steps.get();
    let plan = job.plan(scheduler)?;
    let timesteps: Vec<f64> = plan.steps.iter().map(|step| step.timestep).collect();
    let sigmas = sigmas(&plan);
    match &job.image {
        Some(image) => {
            let ImageRequest { strength, .. } = image;
            let first = timesteps.first().copied().unwrap_or_default();
            let name = image.image.path.display();
            let begins = format!("begins with {name} at timestep {first}");
            said.line(
                "steps",
                format!("{steps}, of which --strength {strength} leaves the last; {begins}"),
            );
            said.field("begins", json!({"timestep": first, "strength": strength}));
        }
        None => said.line("steps", format!("{steps}, from noise")),
    }
    let shown: Vec<_> = timesteps.iter().map(f64::to_string).collect();
    said.line("timesteps", shown.join(" "));
    let known = sigmas.iter().flatten().map(|sigma| format!("{sigma:.4}"));
    said.line("sigmas", known.collect::<Vec<_>>().join(" "));
    let passes = if job.guidance_scale.needs_unconditional() { 2 } else { 1 };
    let (evaluations, count) = (timesteps.len(), job.count.get());
    let of = if passes == 2 { ", each with and without the prompt" } else { "" };
    said.line("unet", format!("{evaluations} evaluations a picture{of}; pictures: {count}"));
    said.field("timesteps", timesteps);
    said.field("sigmas", json!(sigmas));
    said.field("unet_evaluations", evaluations);
    said.field("passes_an_evaluation", passes);
    said.field("pictures", count);
    Ok(evaluations)
}

/// The levels of noise before each evaluation and at the end, as far as the plan has them.
fn sigmas(plan: &Plan) -> Vec<Option<f64>> {
    let level = |Blend { original, noise }: Blend| (original > 0.0).then(|| noise / original);
    // The sample is scaled by what it is made of: the image once, the noise so many times.
    let scaled = |scale: f64| (scale < 1.0).then(|| (1.0 / (scale * scale) - 1.0).sqrt());
    let first = plan.steps.first().and_then(|step| scaled(step.input_scale));
    let first = first.or_else(|| level(plan.start));
    [first].into_iter().chain(plan.steps.iter().map(|step| level(step.noised))).collect()
}
