//! A batch as tensors where the model is.

use crate::data::{Batch, ByteTable, Pixels};
use crate::ops::look_up_bytes;
use crate::{DType, Device, Error, Result, Tensor};

/// A batch on the model's device.
pub(super) struct Inputs {
    images: Images,
    /// (batch, classes)
    targets: Tensor,
    /// (batch)
    pub labels: Tensor,
    /// What the model computes in.
    compute: DType,
}

/// (batch, height, width, channels), as they came.
enum Images {
    Bytes {
        pixels: Tensor,
        /// (channels, 256), in what the model computes in.
        table: Tensor,
        /// What `table` was made of.
        source: ByteTable,
    },
    Floats(Tensor),
}

impl Inputs {
    /// The batch on `device`, for a model that computes in `compute`, with the class that each sample's target gives the
    /// most to as its label.
    pub fn new(batch: &Batch, device: Device, compute: DType) -> Result<Self> {
        let shape = image_shape(batch);
        let images = match &batch.images {
            Pixels::Bytes { values, table } => Images::Bytes {
                pixels: Tensor::new(values, shape)?.to_device(device)?,
                table: tensor_of(table, device, compute)?,
                source: table.clone(),
            },
            Pixels::Floats(values) => Images::Floats(Tensor::new(values, shape)?.to_device(device)?),
        };
        let [targets, labels] = targets_and_labels(batch)?;
        Ok(Inputs { images, targets: targets.to_device(device)?, labels: labels.to_device(device)?, compute })
    }

    /// Takes over a batch of the same shape, of bytes where this one is; the addresses stay.
    pub fn overwrite(&mut self, batch: &Batch) -> Result<()> {
        let shape = image_shape(batch);
        match (&mut self.images, &batch.images) {
            (Images::Bytes { pixels, table, source }, Pixels::Bytes { values, table: new }) => {
                pixels.overwrite(&Tensor::new(values, shape)?)?;
                if source != new {
                    table.overwrite(&tensor_of(new, table.device(), self.compute)?)?;
                    *source = new.clone();
                }
            }
            (Images::Floats(images), Pixels::Floats(values)) => images.overwrite(&Tensor::new(values, shape)?)?,
            _ => {
                return Err(Error::Training(
                    "a batch of bytes and one of floats cannot take each other's place".into(),
                ));
            }
        }
        let [targets, labels] = targets_and_labels(batch)?;
        self.targets.overwrite(&targets)?;
        self.labels.overwrite(&labels)
    }

    /// What the model is given: (batch, height, width, channels), normalised, in what it computes in.
    pub fn images(&self) -> Result<Tensor> {
        match &self.images {
            Images::Bytes { pixels, table, .. } => look_up_bytes(pixels, table),
            Images::Floats(images) => images.cast(self.compute),
        }
    }

    /// (batch, classes)
    pub fn targets(&self) -> &Tensor {
        &self.targets
    }
}

/// The class that each row of `targets` gives the most to: the label, or what mixing made of it.
pub(super) fn strongest_targets(batch: &Batch) -> Vec<usize> {
    let classes = batch.targets.len() / batch.len().max(1);
    let strongest =
        |row: &[f32]| (1..row.len()).fold(0, |best, class| if row[class] > row[best] { class } else { best });
    batch.targets.chunks_exact(classes.max(1)).map(strongest).collect()
}

fn image_shape(batch: &Batch) -> [usize; 4] {
    [batch.len(), batch.height, batch.width, batch.channels]
}

/// (channels, 256). Cast where it is looked up, as images of floats are: so the bits are the same.
fn tensor_of(table: &ByteTable, device: Device, compute: DType) -> Result<Tensor> {
    let rows = [table.channels(), table.values().len() / table.channels()];
    Tensor::new(table.values(), rows)?.to_device(device)?.cast(compute)
}

/// On the host: (batch, classes) and (batch).
fn targets_and_labels(batch: &Batch) -> Result<[Tensor; 2]> {
    let classes = batch.targets.len() / batch.len().max(1);
    let labels: Vec<i64> = strongest_targets(batch).into_iter().map(|label| label as i64).collect();
    Ok([Tensor::new(&batch.targets, [batch.len(), classes])?, Tensor::new(&labels, [batch.len()])?])
}
