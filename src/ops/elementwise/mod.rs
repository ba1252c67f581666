//! Functions of one, two or three tensors, element by element, with NumPy's broadcasting.

pub(crate) mod cost;
mod cpu;
pub(crate) mod gpu;

pub(crate) use cpu::scalar;

use crate::autograd::{Backward, Function, SavedOutput, record};
use crate::tensor::{Place, dispatch_stored, place};
use crate::{DType, Error, Result, Tensor, dispatch_float};

/// A function of one element. Parameters are part of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unary {
    /// −x
    Neg,
    /// |x|, with derivative 0 at 0
    Abs,
    /// x²
    Square,
    /// √x
    Sqrt,
    /// 1 / x
    Recip,
    /// eˣ
    Exp,
    /// ln x
    Ln,
    /// sin x
    Sin,
    /// cos x
    Cos,
    /// tanh x
    Tanh,
    /// 1 / (1 + e⁻ˣ)
    Sigmoid,
    /// 2/√π ∫₀ˣ exp(−t²) dt
    Erf,
    /// max(x, 0), with derivative 0 at 0
    Relu,
    /// x where positive, else slope · x
    LeakyRelu(f64),
    /// x / (1 + e⁻ˣ)
    Silu,
    /// x Φ(x), the exact form (Hendrycks and Gimpel 2016)
    Gelu,
    /// ln(1 + eˣ)
    Softplus,
    /// factor · x
    Scale(f64),
    /// x + offset
    Shift(f64),
    /// xᵖ
    Powf(f64),
    /// x limited to [low, high], with derivative 0 outside
    Clamp(f64, f64),
}

impl Unary {
    /// Whether the derivative is cheaper from the output than from the input.
    fn derives_from_output(self) -> bool {
        matches!(self, Unary::Exp | Unary::Sqrt | Unary::Recip | Unary::Tanh | Unary::Sigmoid)
    }

    /// The function's name, for errors.
    pub fn name(self) -> &'static str {
        match self {
            Unary::Neg => "neg",
            Unary::Abs => "abs",
            Unary::Square => "square",
            Unary::Sqrt => "sqrt",
            Unary::Recip => "recip",
            Unary::Exp => "exp",
            Unary::Ln => "ln",
            Unary::Sin => "sin",
            Unary::Cos => "cos",
            Unary::Tanh => "tanh",
            Unary::Sigmoid => "sigmoid",
            Unary::Erf => "erf",
            Unary::Relu => "relu",
            Unary::LeakyRelu(_) => "leaky_relu",
            Unary::Silu => "silu",
            Unary::Gelu => "gelu",
            Unary::Softplus => "softplus",
            Unary::Scale(_) => "scale",
            Unary::Shift(_) => "shift",
            Unary::Powf(_) => "powf",
            Unary::Clamp(..) => "clamp",
        }
    }

    /// Whether the derivative is the same everywhere, so that nothing need be saved.
    fn constant_derivative(self) -> Option<f64> {
        match self {
            Unary::Neg => Some(-1.0),
            Unary::Scale(factor) => Some(factor),
            Unary::Shift(_) => Some(1.0),
            // By the formula, 0 · x⁻¹, which is NaN at 0.
            Unary::Powf(0.0) => Some(0.0),
            _ => None,
        }
    }
}

/// A function of two elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binary {
    /// a + b
    Add,
    /// a − b
    Sub,
    /// a · b
    Mul,
    /// a / b
    Div,
    /// max(a, b); the gradient is split where they are equal
    Maximum,
    /// min(a, b); the gradient is split where they are equal
    Minimum,
    /// 1 where a > b, else 0; no gradient
    Greater,
    /// 1 where a = b, else 0; no gradient
    Equal,
}

impl Binary {
    /// The function's name, for errors.
    pub fn name(self) -> &'static str {
        match self {
            Binary::Add => "add",
            Binary::Sub => "sub",
            Binary::Mul => "mul",
            Binary::Div => "div",
            Binary::Maximum => "maximum",
            Binary::Minimum => "minimum",
            Binary::Greater => "greater",
            Binary::Equal => "equal",
        }
    }
}

macro_rules! unary_methods {
    ($($(#[$doc:meta])* $name:ident($($arg:ident),*) = $kind:expr;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// Where the dtype is not floating point.
        pub fn $name(&self $(, $arg: f64)*) -> Result<Tensor> {
            self.unary($kind)
        }
    )*};
}

macro_rules! binary_methods {
    ($($(#[$doc:meta])* $name:ident = $kind:expr;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// Where the shapes do not broadcast or the dtypes differ.
        pub fn $name(&self, rhs: &Tensor) -> Result<Tensor> {
            self.binary(rhs, $kind)
        }
    )*};
}

impl Tensor {
    unary_methods! {
        /// −x
        neg() = Unary::Neg;
        /// |x|
        abs() = Unary::Abs;
        /// x²
        square() = Unary::Square;
        /// √x
        sqrt() = Unary::Sqrt;
        /// 1 / x
        recip() = Unary::Recip;
        /// eˣ
        exp() = Unary::Exp;
        /// ln x
        ln() = Unary::Ln;
        /// sin x
        sin() = Unary::Sin;
        /// cos x
        cos() = Unary::Cos;
        /// tanh x
        tanh() = Unary::Tanh;
        /// 1 / (1 + e⁻ˣ)
        sigmoid() = Unary::Sigmoid;
        /// Error function.
        erf() = Unary::Erf;
        /// max(x, 0)
        relu() = Unary::Relu;
        /// x where positive, else slope · x
        leaky_relu(slope) = Unary::LeakyRelu(slope);
        /// x / (1 + e⁻ˣ)
        silu() = Unary::Silu;
        /// x Φ(x), exact.
        gelu() = Unary::Gelu;
        /// ln(1 + eˣ)
        softplus() = Unary::Softplus;
        /// factor · x
        scale(factor) = Unary::Scale(factor);
        /// x + offset
        shift(offset) = Unary::Shift(offset);
        /// xᵖ
        powf(power) = Unary::Powf(power);
        /// x limited to [low, high]
        clamp(low, high) = Unary::Clamp(low, high);
    }

    binary_methods! {
        /// a + b
        add = Binary::Add;
        /// a − b
        sub = Binary::Sub;
        /// a · b
        mul = Binary::Mul;
        /// a / b
        div = Binary::Div;
        /// max(a, b)
        maximum = Binary::Maximum;
        /// min(a, b)
        minimum = Binary::Minimum;
        /// 1 where a > b, else 0, in the tensors' dtype.
        greater = Binary::Greater;
        /// 1 where a = b, else 0, in the tensors' dtype.
        equal = Binary::Equal;
    }

    /// Applies `function` to every element.
    ///
    /// # Errors
    /// Where the dtype is not floating point.
    pub fn unary(&self, function: Unary) -> Result<Tensor> {
        let (op, dtype) = (function.name(), self.dtype());
        self.expect_float(op)?;
        let output = match place(op, &[self])? {
            Place::Gpu(gpu) => gpu::unary(gpu, function, self)?,
            Place::Host => dispatch_stored!(op, dtype, (S, T) => {
                Tensor::from_stored(cpu::unary::<S, T>(function, &self.stored(op)?), self.shape(), dtype)
            })?,
        };
        Ok(record(output, &[self], |output| UnaryRule {
            function,
            input: (!function.derives_from_output() && function.constant_derivative().is_none()).then(|| self.clone()),
            output,
        }))
    }

    /// Applies `function` to every pair of elements, after broadcasting.
    ///
    /// # Errors
    /// Where the shapes do not broadcast or the dtypes differ.
    pub fn binary(&self, rhs: &Tensor, function: Binary) -> Result<Tensor> {
        let (op, dtype) = (function.name(), self.dtype());
        if rhs.dtype() != dtype {
            return Err(Error::DType { op, got: rhs.dtype(), expected: dtype.to_string() });
        }
        self.expect_float(op)?;
        let shape = self.shape().broadcast(rhs.shape(), op)?;
        let output = match place(op, &[self, rhs])? {
            Place::Gpu(gpu) => gpu::binary(gpu, function, self, rhs, &shape)?,
            Place::Host => dispatch_stored!(op, dtype, (S, T) => {
                let (a, b) = (self.stored::<S>(op)?, rhs.stored::<S>(op)?);
                let output = cpu::binary::<S, T>(function, (&a, self.shape()), (&b, rhs.shape()), &shape);
                Tensor::from_stored(output, shape, dtype)
            })?,
        };
        if matches!(function, Binary::Greater | Binary::Equal) {
            return Ok(output);
        }
        Ok(record(output, &[self, rhs], |_| BinaryRule { function, left: self.clone(), right: rhs.clone() }))
    }
}

struct UnaryRule {
    function: Unary,
    input: Option<Tensor>,
    output: SavedOutput,
}

impl Function for UnaryRule {
    fn name(&self) -> &'static str {
        self.function.name()
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let grad = backward.grad();
        if let Some(slope) = self.function.constant_derivative() {
            return Ok(vec![Some(if slope == 1.0 { grad.clone() } else { grad.scale(slope)? })]);
        }
        let saved = self.input.clone().unwrap_or_else(|| backward.output(&self.output));
        if backward.create_graph() {
            return Ok(vec![Some(grad.mul(&derivative(self.function, &saved)?)?)]);
        }
        Ok(vec![Some(fused_gradient(self.function, &saved, grad)?)])
    }
}

/// grad · f′ in one loop, off the tape.
fn fused_gradient(function: Unary, saved: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let (op, dtype) = (function.name(), grad.dtype());
    if let Place::Gpu(gpu) = place(op, &[saved, grad])? {
        return gpu::unary_backward(gpu, function, saved, grad);
    }
    dispatch_stored!(op, dtype, (S, T) => {
        let gradient = cpu::unary_backward::<S, T>(function, &saved.stored(op)?, &grad.stored(op)?);
        Tensor::from_stored(gradient, grad.shape(), dtype)
    })
}

/// f′ made of recorded ops, at the saved input, or at the output where `derives_from_output`. The fused form of the
/// same table is `cpu::unary_backward`.
pub(super) fn derivative(function: Unary, saved: &Tensor) -> Result<Tensor> {
    let x = saved;
    match function {
        Unary::Neg | Unary::Scale(_) | Unary::Shift(_) => x.full_like(function.constant_derivative().unwrap_or(1.0)),
        // Constant in pieces, so not differentiable again.
        Unary::Abs | Unary::Relu | Unary::LeakyRelu(_) | Unary::Clamp(..) => {
            fused_gradient(function, x, &x.full_like(1.0)?)
        }
        Unary::Square => x.scale(2.0),
        Unary::Sqrt => saved.recip()?.scale(0.5),
        Unary::Recip => saved.square()?.neg(),
        Unary::Exp => Ok(saved.clone()),
        Unary::Ln => x.recip(),
        Unary::Sin => x.cos(),
        Unary::Cos => x.sin()?.neg(),
        Unary::Tanh => saved.square()?.neg()?.shift(1.0),
        Unary::Sigmoid => saved.mul(&saved.neg()?.shift(1.0)?),
        Unary::Erf => x.square()?.neg()?.exp()?.scale(std::f64::consts::FRAC_2_SQRT_PI),
        Unary::Silu => {
            let x = x.clamp(-cpu::LIMIT, cpu::LIMIT)?;
            let sigmoid = x.sigmoid()?;
            sigmoid.mul(&x.mul(&sigmoid.neg()?.shift(1.0)?)?.shift(1.0)?)
        }
        Unary::Gelu => {
            let x = x.clamp(-cpu::LIMIT, cpu::LIMIT)?;
            let cdf = x.scale(std::f64::consts::FRAC_1_SQRT_2)?.erf()?.scale(0.5)?.shift(0.5)?;
            let pdf = x.square()?.scale(-0.5)?.exp()?.scale(0.398_942_280_401_432_7)?;
            cdf.add(&x.mul(&pdf)?)
        }
        Unary::Softplus => x.sigmoid(),
        Unary::Powf(power) => x.powf(power - 1.0)?.scale(power),
    }
}

struct BinaryRule {
    function: Binary,
    left: Tensor,
    right: Tensor,
}

impl Function for BinaryRule {
    fn name(&self) -> &'static str {
        self.function.name()
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let (grad, a, b) = (backward.grad(), &self.left, &self.right);
        let left = |gradient: Result<Tensor>| gradient?.sum_to(a.shape());
        let right = |gradient: Result<Tensor>| gradient?.sum_to(b.shape());
        // The share of the larger one: 1, or ½ where both are equal.
        let share = |larger: &Tensor, smaller: &Tensor| -> Result<Tensor> {
            larger.greater(smaller)?.add(&larger.equal(smaller)?.scale(0.5)?)
        };
        let needs = |index: usize, gradient: &dyn Fn() -> Result<Tensor>| {
            if backward.needs(index) { gradient().map(Some) } else { Ok(None) }
        };
        let (da, db) = match self.function {
            Binary::Add => (needs(0, &|| left(Ok(grad.clone())))?, needs(1, &|| right(Ok(grad.clone())))?),
            Binary::Sub => (needs(0, &|| left(Ok(grad.clone())))?, needs(1, &|| right(grad.neg()))?),
            Binary::Mul => (needs(0, &|| left(grad.mul(b)))?, needs(1, &|| right(grad.mul(a)))?),
            Binary::Div => {
                (needs(0, &|| left(grad.div(b)))?, needs(1, &|| right(grad.mul(a)?.div(&b.square()?)?.neg()))?)
            }
            Binary::Maximum => {
                (needs(0, &|| left(grad.mul(&share(a, b)?)))?, needs(1, &|| right(grad.mul(&share(b, a)?)))?)
            }
            Binary::Minimum => {
                (needs(0, &|| left(grad.mul(&share(b, a)?)))?, needs(1, &|| right(grad.mul(&share(a, b)?)))?)
            }
            Binary::Greater | Binary::Equal => (None, None),
        };
        Ok(vec![da, db])
    }
}

/// Takes `on_true` where `mask` is not 0, else `on_false`; all three broadcast.
///
/// # Errors
/// Where the shapes do not broadcast or the dtypes differ.
pub fn select(mask: &Tensor, on_true: &Tensor, on_false: &Tensor) -> Result<Tensor> {
    // By selection and not by arithmetic with the mask, which would turn an unselected infinity into NaN.
    let (dtype, op) = (on_true.dtype(), "select");
    on_true.expect_float(op)?;
    for tensor in [mask, on_false] {
        tensor.expect_dtype(op, dtype)?;
    }
    let place = place(op, &[mask, on_true, on_false])?;
    let shape = mask.shape().broadcast(on_true.shape(), op)?.broadcast(on_false.shape(), op)?;
    let (mask, yes, no) =
        (mask.detach().broadcast_to(&shape)?, on_true.broadcast_to(&shape)?, on_false.broadcast_to(&shape)?);
    let output = match place {
        Place::Gpu(gpu) => gpu::select(gpu, &mask, &yes, &no)?,
        Place::Host => dispatch_float!(op, dtype, T => {
            let selected = cpu::select::<T>(&mask.floats(op)?, &yes.floats(op)?, &no.floats(op)?);
            Tensor::from_floats(selected, shape, dtype)
        })?,
    };
    Ok(record(output, &[&yes, &no], |_| SelectRule { mask: mask.clone() }))
}

struct SelectRule {
    mask: Tensor,
}

impl Function for SelectRule {
    fn name(&self) -> &'static str {
        "select"
    }

    fn backward(&self, backward: &Backward<'_>) -> Result<Vec<Option<Tensor>>> {
        let zero = backward.grad().full_like(0.0)?;
        let yes = if backward.needs(0) { Some(select(&self.mask, backward.grad(), &zero)?) } else { None };
        let no = if backward.needs(1) { Some(select(&self.mask, &zero, backward.grad())?) } else { None };
        Ok(vec![yes, no])
    }
}

/// `sum + addend` off the tape, in `sum`'s memory where nobody else holds it.
pub(crate) fn add_in_place(mut sum: Tensor, addend: &Tensor) -> Result<Tensor> {
    let same = sum.is_unique() && sum.shape() == addend.shape() && sum.dtype() == addend.dtype();
    match place("add", &[&sum, addend])? {
        Place::Gpu(gpu) if same => {
            gpu::accumulate(gpu, &mut sum, addend)?;
            Ok(sum)
        }
        // `f16` has no loop of its own in place: it is widened first.
        Place::Host if same && sum.dtype() != DType::F16 => dispatch_stored!("add", sum.dtype(), (S, T) => {
            cpu::accumulate::<S, T>(sum.data_mut()?, addend.data()?);
            Ok(sum)
        }),
        _ => crate::autograd::no_grad(|| sum.add(addend)),
    }
}
