//! `--grid`: pictures that differ in one or two flags, on one labelled sheet. Separate from the
//! single command because its product is the sheet; each cell is a job of its own, and the picture
//! of that job.

mod axes;
mod font;
mod record;
mod sheet;

use std::time::Instant;

use super::args::Args;
use super::display::Display;
use super::events::{Made, PictureName, Teller};
use super::files;
use super::job::{self, Job, Request};
use super::output::Target;
use super::paint::{AUTO_PIXELS, Order, Painted, paint_pictures};
use super::painter;
use super::prompt::{given_prompt, prompt_of_stdin};
use super::run::{Painter, run_with};
use super::surroundings::Surroundings;
use crate::error::{Error, Result};
use crate::image::ImageSize;
use crate::pipeline;
use crate::progress::Progress;
use crate::schedule::SchedulerConfig;
use crate::weights::Model;
pub(super) use axes::Axis;
pub(super) use record::GridRecord;
use sheet::Sheet;

/// Cells of a sheet at most.
const MAX_CELLS: usize = 256;
/// What the prompts of a sheet take in its record at most, where they differ.
const MAX_PROMPT_BYTES: usize = 512 << 10;

/// A sheet to make.
#[derive(Debug, Clone, PartialEq)]
pub struct GridJob {
    /// One or two: the first goes to the right, the second one down.
    axes: Vec<Axis>,
    /// The single command of each cell, row by row.
    cells: Vec<Job>,
}

/// What a command line with `--grid` asks for.
///
/// # Errors
/// If the axes do not go together, or a cell is no picture.
pub(super) fn request(
    mut args: Args,
    notes: &[String],
    surroundings: &mut dyn Surroundings,
) -> Result<Request> {
    let axes = std::mem::take(&mut args.grid);
    check(&axes, &args)?;
    let prompt = match given_prompt(&mut args)? {
        Some(prompt) => prompt,
        None => prompt_of_stdin(surroundings)?,
    };
    let seed = args.picture.seed.unwrap_or_else(|| surroundings.random_seed());
    args.picture.seed = Some(seed);
    let wrong = |error: String| Error::usage(format!("--grid: {error}"));
    let mut cells: Vec<Job> = Vec::new();
    let no_value = [None];
    let values = |place: usize| -> Vec<Option<(&Axis, &String)>> {
        let axis = axes.get(place).into_iter();
        axis.flat_map(|axis| axis.values.iter().map(move |value| Some((axis, value)))).collect()
    };
    let (across, down) = (values(0), values(1));
    let down = if down.is_empty() { &no_value[..] } else { &down };
    for below in down {
        for beside in &across {
            let (mut cell, mut prompt) = (args.clone(), prompt.clone());
            for (axis, value) in [beside, below].into_iter().flatten() {
                axis.put(value, &mut cell.picture, &mut prompt).map_err(wrong)?;
            }
            cell.picture.prompt = Some(prompt);
            cells.push(Job { notes: notes.to_vec(), ..job::job(cell, surroundings)? });
        }
    }
    check_prompts(&cells)?;
    let grid = GridJob { axes, cells };
    if let Some((first, size)) = grid.cells.first().and_then(|job| Some((job, job.own_size()?))) {
        grid.sheet(size, first)?;
    }
    Ok(Request::Grid(Box::new(grid)))
}

fn check(axes: &[Axis], args: &Args) -> Result<()> {
    if axes.len() > 2 {
        return Err(Error::usage(format!(
            "--grid has {} axes; one goes to the right and a second one down",
            axes.len()
        )));
    }
    if let [first, second] = axes
        && first.name == second.name
    {
        return Err(Error::usage(format!("--grid: both axes are {}", first.name)));
    }
    let cells = axes.iter().map(|axis| axis.values.len()).product::<usize>();
    if cells > MAX_CELLS {
        let sides: Vec<_> = axes.iter().map(|axis| axis.values.len().to_string()).collect();
        let sides = sides.join("x");
        return Err(Error::usage(format!(
            "--grid: {sides} are {cells} pictures, at most {MAX_CELLS}"
        )));
    }
    match args.picture.count.get() {
        1 => Ok(()),
        count => Err(Error::usage(format!(
            "--grid makes one sheet, --count {count} asks for more; --grid seed=1-{count} shows \
             so many seeds"
        ))),
    }
}

/// The prompts are in the record, which has an end.
fn check_prompts(cells: &[Job]) -> Result<()> {
    let differ = |job: &&Job| {
        cells.first().is_some_and(|first| {
            let (of_first, of_job) = (first.texts(first.seed), job.texts(job.seed));
            of_first != of_job
        })
    };
    let escaped = |text: &str| serde_json::Value::from(text).to_string().len();
    let bytes: usize = cells
        .iter()
        .filter(differ)
        .map(|job| {
            let texts = job.texts(job.seed);
            let given = escaped(&job.prompt) + escaped(&job.negative_prompt);
            given + escaped(&texts.prompt) + escaped(&texts.negative_prompt)
        })
        .sum();
    match bytes {
        ..=MAX_PROMPT_BYTES => Ok(()),
        _ => Err(Error::usage(format!(
            "--grid: the prompts of {} pictures take {bytes} bytes in the sheet's record, at most \
             {MAX_PROMPT_BYTES}: fewer values or shorter prompts",
            cells.len()
        ))),
    }
}

impl GridJob {
    fn sheet(&self, cell: ImageSize, job: &Job) -> Result<Sheet> {
        Sheet::new(cell, &self.axes, self.target(job).format())
    }

    fn target(&self, first: &Job) -> Target {
        first.output.target(first.seed, 1)
    }

    /// Whether a model, of which nothing is loaded yet, can make all cells.
    fn check(&self, model: &Model, first: &Job) -> Result<()> {
        let default = pipeline::default_size(model)?;
        self.sheet(first.picture_size(default), first)?;
        let config = SchedulerConfig::parse(&model.scheduler_config()?)?;
        self.cells.iter().try_for_each(|cell| cell.plan(&cell.schedule(&config)?).map(drop))
    }
}

/// Makes the sheet.
///
/// # Errors
/// As the single command; there is a whole sheet or none.
pub fn grid(grid: &GridJob) -> Result<()> {
    let (first, start) = (grid.first()?, Instant::now());
    let check = |model: &Model| grid.check(model, first);
    run_with(
        first,
        |teller| painter::open_if(first, &check, teller),
        |painter, display, teller| {
            let painted = grid.paint(painter, display, teller)?;
            grid.write(first, &painted, display, teller, start)?;
            teller.stream.check()
        },
    )
}

impl GridJob {
    fn first(&self) -> Result<&Job> {
        self.cells.first().ok_or_else(|| Error::usage("--grid: no value"))
    }

    fn order<'a>(&self, job: &'a Job) -> Order<'a> {
        let target = self.target(job);
        let preview = job.preview_target(&target);
        Order { job, seed: job.seed, preview, format: target.format() }
    }

    /// The pictures of all cells, in their order: those that can be made together are.
    fn paint(
        &self,
        painter: &mut dyn Painter,
        display: &Display,
        teller: &Teller<'_>,
    ) -> Result<Vec<Painted>> {
        let default = painter.default_size();
        let mut left: Vec<(usize, &Job)> = (1..).zip(&self.cells).collect();
        let mut painted: Vec<(usize, Painted)> = Vec::new();
        while let Some(&(number, first)) = left.first() {
            let most = first.batch_size.or(AUTO_PIXELS, first.picture_size(default));
            let mut group: Vec<(usize, &Job)> = Vec::new();
            left.retain(|&(at, job)| {
                let goes = group.len() < most && (at == number || first.goes_with(job, default));
                if goes {
                    group.push((at, job));
                }
                !goes
            });
            display.check()?;
            let names: Vec<_> = group.iter().map(|(at, _)| at.to_string()).collect();
            display.begin(format!("{}/{}", names.join("+"), self.cells.len()));
            let orders: Vec<_> = group.iter().map(|&(_, job)| self.order(job)).collect();
            let name = |&(index, job): &(usize, &Job)| PictureName {
                line: None,
                index,
                seed: job.seed,
                output: None,
            };
            let names: Vec<_> = group.iter().map(name).collect();
            let teller = Teller { pictures: &names, ..*teller };
            let pictures = paint_pictures(&orders, painter, &teller)?;
            painted.extend(group.iter().map(|(at, _)| *at).zip(pictures));
        }
        painted.sort_by_key(|(number, _)| *number);
        Ok(painted.into_iter().map(|(_, painted)| painted).collect())
    }

    /// The sheet's file.
    fn write(
        &self,
        first: &Job,
        painted: &[Painted],
        display: &Display,
        teller: &Teller<'_>,
        start: Instant,
    ) -> Result<()> {
        let [Painted { picture, parameters, .. }, ..] = painted else {
            return Err(Error::other("--grid: there is no picture"));
        };
        let sheet = self.sheet(picture.size(), first)?;
        let pictures: Vec<_> = painted.iter().map(|painted| painted.picture.clone()).collect();
        let drawn = sheet.draw(&pictures)?;
        let cells = (0..).zip(painted);
        let cells = cells.map(|(at, painted)| (painted.settings.clone(), sheet.place(at)));
        let record = GridRecord::new(&self.axes, &cells.collect::<Vec<_>>())?;
        let target = self.target(first);
        let file = drawn.to_file(target.format(), parameters, &record.to_json()?)?;
        let path = files::write(&target, &file)?;
        let name = path.map_or("standard output".to_owned(), |path| path.display().to_string());
        let (count, size) = (painted.len(), sheet.size());
        let shown = name.replace(char::is_control, " ");
        let pace = super::display::seconds(start.elapsed());
        display.line(format!("{shown}: {count} pictures, {size}, in {pace}"));
        let picture = PictureName { line: None, index: 1, seed: first.seed, output: None };
        let steps = self.cells.iter().map(|job| job.steps.get()).sum();
        let settings = &*record.key();
        teller.done(&Made { picture, output: &name, size, steps, settings }, start);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
