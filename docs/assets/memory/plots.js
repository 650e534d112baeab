// A plot on a canvas: sharp on every screen, in the colours of the page, which may be light or dark.
"use strict";

class Plot {
  /** `low`..`high` are the values at the bottom and the top, `steps` the number of steps from left to right. */
  constructor(canvas) {
    this.canvas = canvas;
    this.margin = { left: 40, right: 10, top: 10, bottom: 22 };
  }

  /** Empty the canvas and set what its edges mean. */
  begin({ steps, low, high }) {
    const { clientWidth, clientHeight } = this.canvas, scale = window.devicePixelRatio || 1;
    Object.assign(this, { steps, low, high, width: clientWidth, height: clientHeight });
    this.canvas.width = Math.round(clientWidth * scale);
    this.canvas.height = Math.round(clientHeight * scale);
    this.pen = this.canvas.getContext("2d");
    this.pen.scale(scale, scale);
    this.pen.font = "12px system-ui, sans-serif";
    this.pen.lineJoin = "round";
    const style = getComputedStyle(this.canvas);
    this.colour = (name) => style.getPropertyValue(`--memory-${name}`).trim();
  }

  x(step) {
    return this.margin.left + (step / this.steps) * (this.width - this.margin.left - this.margin.right);
  }

  y(value) {
    const inside = this.height - this.margin.top - this.margin.bottom;
    return this.margin.top + ((this.high - value) / (this.high - this.low)) * inside;
  }

  /** The step and the value at a point of the canvas, in CSS pixels. */
  at(left, top) {
    const { margin, width, height } = this;
    const value = this.high - ((top - margin.top) / (height - margin.top - margin.bottom)) * (this.high - this.low);
    return { step: ((left - margin.left) / (width - margin.left - margin.right)) * this.steps, value };
  }

  /** Frame, a line at zero and numbers at the edges; `label` gives the text of a step. */
  axes(ticks, label = String) {
    const { pen } = this, values = [this.low, 0, this.high];
    pen.strokeStyle = this.colour("frame");
    pen.fillStyle = this.colour("label");
    pen.lineWidth = 1;
    pen.strokeRect(this.x(0), this.y(this.high), this.x(this.steps) - this.x(0), this.y(this.low) - this.y(this.high));
    this.path([[0, 0], [this.steps, 0]], "frame", 1);
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const value of values) pen.fillText(short(value), this.margin.left - 5, this.y(value));
    pen.textBaseline = "top";
    ticks.forEach((step, k) => {
      pen.textAlign = k === 0 ? "left" : k === ticks.length - 1 ? "right" : "center";
      pen.fillText(label(step), this.x(step), this.height - this.margin.bottom + 6);
    });
  }

  /** A line through points of step and value, kept inside the frame. */
  path(points, colour, width, dash = []) {
    const { pen } = this;
    pen.save();
    this.clip();
    pen.beginPath();
    for (const [step, value] of points) pen.lineTo(this.x(step), this.y(Math.max(-1e6, Math.min(1e6, value))));
    pen.strokeStyle = this.colour(colour);
    pen.lineWidth = width;
    pen.setLineDash(dash);
    pen.stroke();
    pen.restore();
  }

  /** The area between a line and the value `from`. */
  area(points, from, colour) {
    const { pen } = this;
    pen.save();
    this.clip();
    pen.beginPath();
    pen.moveTo(this.x(points[0][0]), this.y(from));
    for (const [step, value] of points) pen.lineTo(this.x(step), this.y(value));
    pen.lineTo(this.x(points[points.length - 1][0]), this.y(from));
    pen.fillStyle = this.colour(colour);
    pen.fill();
    pen.restore();
  }

  /** A bar for each value, one step wide; `colourOf` gives the colour of bar k. */
  bars(values, colourOf) {
    values.forEach((value, k) => {
      this.pen.fillStyle = this.colour(colourOf(k));
      const [left, right] = [this.x(k + 0.1), this.x(k + 0.9)], [top, bottom] = [this.y(Math.max(value, 0)), this.y(Math.min(value, 0))];
      this.pen.fillRect(left, top, right - left, Math.max(bottom - top, 1));
    });
  }

  clip() {
    this.pen.beginPath();
    this.pen.rect(this.x(0), this.y(this.high), this.x(this.steps) - this.x(0), this.y(this.low) - this.y(this.high));
    this.pen.clip();
  }
}

/** A number in a few characters. */
function short(value) {
  return value === 0 ? "0" : Math.abs(value) < 0.01 ? value.toExponential(0) : String(Number(value.toPrecision(2)));
}

/** The largest size among the values, rounded up to 1, 2 or 5 times a power of ten. */
function reach(values) {
  let most = 1e-9;
  for (const value of values) most = Math.max(most, Math.abs(value));
  const power = 10 ** Math.floor(Math.log10(most));
  return power * [1, 2, 5, 10].find((k) => k * power >= most * 0.999);
}
