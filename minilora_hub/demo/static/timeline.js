// Below the columns: how far the answers agree, where they first differ, and a slider over the steps.

const READING_PACE = 8; // tokens per second
const SVG = "http://www.w3.org/2000/svg";

class Timeline {
  // Calls go(step) when a visitor moves the slider, and pick(column) when they choose a fork.
  constructor(box, go, pick) {
    this.box = box;
    this.pick = pick;
    this.slider = box.querySelector(".ml-scrub");
    this.button = box.querySelector(".ml-play");
    this.go = go;
    this.timer = null;
    this.steps = 0;
    this.slider.addEventListener("input", () => {
      this.pause();
      go(Number(this.slider.value));
    });
    this.button.addEventListener("click", () => (this.timer ? this.pause() : this.play()));
  }

  // Play the steps one after the other, from the start if the last one is shown.
  play() {
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    let step = Number(this.slider.value) >= this.steps ? 0 : Number(this.slider.value);
    this.pause();
    if (still) {
      this.go(this.steps);
      return;
    }
    this.go(step);
    this.timer = setInterval(() => {
      this.go(++step);
      if (step >= this.steps) this.pause();
    }, 1000 / READING_PACE);
    this.label();
  }

  // As `play`, from the start.
  replay() {
    this.slider.value = 0;
    this.play();
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.label();
  }

  label() {
    this.button.dataset.playing = this.timer ? "yes" : "no";
    this.button.setAttribute("aria-label", this.timer ? "Pause" : "Play the steps again");
  }

  // steps: of the longest answer; step: shown; keepers: for each token of the base, how many of `others` have it too;
  // forks: [{badge, kind, at, column}] of the others.
  paint(steps, step, keepers, others, forks) {
    this.steps = steps;
    this.slider.max = steps;
    this.slider.value = step;
    this.slider.setAttribute("aria-valuetext", `step ${step} of ${steps}`);
    this.box.querySelector(".ml-at").textContent = `${step} / ${steps}`;
    this.paintRibbon(steps, keepers, others);
    this.box.style.setProperty("--shown", steps ? step / steps : 0);
    this.paintForks(steps, forks);
  }

  paintRibbon(steps, keepers, others) {
    const ribbon = this.box.querySelector(".ml-ribbon");
    ribbon.hidden = others === 0;
    const bars = keepers.map((count, i) => {
      const height = count ? count / others : 0.06;
      return `M${i + 0.08} 1V${(1 - height).toFixed(3)}H${i + 0.92}V1Z`;
    });
    const every = keepers.filter((count) => count === others).length;
    const none = keepers.filter((count) => count === 0).length;
    const words =
      others === 1
        ? `Agreement: ${every} of the base's ${keepers.length} tokens are also in the other answer.`
        : `Agreement: of the base's ${keepers.length} tokens ${every} are in all ${others} other answers, ${none} in none.`;
    ribbon.setAttribute("aria-label", words);
    ribbon.querySelector("title").textContent = words;
    ribbon.setAttribute("viewBox", `0 0 ${Math.max(steps, 1)} 1`);
    ribbon.querySelector("path").setAttribute("d", bars.join(""));
  }

  paintForks(steps, forks) {
    const row = this.box.querySelector(".ml-forks");
    const signature = JSON.stringify([steps, forks]);
    if (signature === this.forks) return;
    this.forks = signature;
    let left = "-9999px"; // of the tick before: each has its place, or the next free one
    row.replaceChildren(
      ...forks.toSorted((one, other) => one.at - other.at).map(({ badge, kind, name, at, column }) => {
        const tick = make("button", "ml-tick", badge);
        tick.type = "button";
        tick.dataset.kind = kind;
        left = `max(${(100 * at) / Math.max(steps, 1)}%, ${left} + var(--tick))`;
        tick.style.left = left;
        tick.setAttribute("aria-label", `${name} differs from the base from token ${at + 1}`);
        tick.addEventListener("click", () => this.pick(column));
        return tick;
      }),
    );
  }
}
