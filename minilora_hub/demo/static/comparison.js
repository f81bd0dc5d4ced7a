// The whole comparison: the shown step, the active highlights, and the token that a visitor has chosen.

class Stage {
  // trigger(name, data) sends an event to the server; see stage.js.
  constructor(element, trigger) {
    this.box = element.querySelector(".ml-stage");
    this.trigger = trigger;
    this.columns = [];
    this.described = null;
    this.run = null;
    this.step = null; // null: follow the latest step
    this.chosen = null; // {column, at}
    this.open = null; // the column that a phone shows
    this.talk = this.box.querySelector(".ml-talk select");
    this.talk.addEventListener("change", () => this.trigger("follow", { continues: this.talk.value }));
    this.row = this.box.querySelector(".ml-columns");
    this.tabs = new Tabs(this.box.querySelector(".ml-tabs"), this.row, (index) => {
      this.open = index;
      if (this.columns[0].now) this.refresh(); // not while they are being built
    });
    this.timeline = new Timeline(
      this.box.querySelector(".ml-timeline"),
      (step) => this.go(step),
      (column) => this.chooseFork(column),
    );
    this.experts = new Experts(this.box.querySelector(".ml-heat"), (column, expert) => this.solo(column, expert));
    this.inspector = new Inspector(this.box.querySelector(".ml-inspector"), () => this.unchoose());
    this.tuner = new Tuner(this.box.querySelector(".ml-tuner"), (column, sampling, again) =>
      this.trigger(again ? "retune" : "tune", { column, sampling, again }),
    );
    this.box.querySelector(".ml-add").addEventListener("click", () => minilora.adapter("add"));
    this.box.querySelector(".ml-picture").addEventListener("click", () => this.share());
    for (const name of ["tall", "markdown"]) {
      this.box.querySelector(".ml-" + name).addEventListener("click", ({ currentTarget: button }) => {
        const pressed = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(pressed));
        this.box.dataset[name] = pressed ? "yes" : "no";
      });
    }
    minilora.marks.listen(() => this.refresh());
    this.keys();
  }

  // ---- what the server sent ----

  paint(now) {
    if (!now || !now.columns) return;
    this.now = now;
    const described = JSON.stringify(now.columns.map((column) => column.about));
    const fresh = now.run !== this.run || described !== this.described;
    if (described !== this.described) this.offerTalk(now.columns);
    if (fresh) this.start(now, described);
    const before = this.columns.map((column) => column.answer.tokens.length);
    this.paintAsked(now);
    now.columns.forEach((column, index) => this.columns[index].paint(column));
    this.compare(before);
    this.box.dataset.blind = now.blind ? "yes" : "no";
    this.refresh();
    if (fresh && now.replay) this.timeline.replay();
  }

  start(now, described) {
    this.run = now.run;
    this.described = described;
    this.timeline.pause();
    this.step = null;
    this.chosen = null;
    this.inspector.clear();
    this.columns = now.columns.map(
      (column, index) => new Column(column.about, (at) => this.choose(index, at), (name) => this.act(index, name)),
    );
    this.row.replaceChildren(...this.columns.map((column) => column.card));
    this.box.style.setProperty("--columns", this.columns.length);
    this.box.dataset.count = this.columns.length;
    this.tabs.build(now.columns.map((column) => column.about), this.columns.map((column) => column.card));
  }

  // The line above the columns: the prompt, the expected answer, and whether this is a replay.
  paintAsked({ prompt, expected, replay }) {
    const find = (name) => this.box.querySelector(name);
    find(".ml-replay-mark").hidden = !replay;
    find(".ml-asked-prompt").textContent = find(".ml-asked-prompt").title = prompt;
    find(".ml-asked-prompt").hidden = !prompt;
    find(".ml-expected").hidden = !expected;
    find(".ml-expected code").textContent = find(".ml-expected").title = expected || "";
    find(".ml-replay-words").textContent = replay || "";
    this.box.dataset.replay = replay ? "yes" : "no";
  }

  // What the next prompt continues: nothing, each column's own answers, or those of one column for all.
  offerTalk(columns) {
    const option = (text, value) => Object.assign(make("option", "", text), { value });
    if (this.talk.value && this.talk.value !== "new") this.trigger("follow", { continues: "new" });
    const all = columns.map(({ about }, index) => option(`continues for all from ${about.name}`, index));
    this.talk.replaceChildren(option("begins anew", "new"), option("continues, each from its own answer", "own"), ...all);
  }

  // Which tokens each answer shares with the base's; only new tokens are compared.
  compare(before) {
    const visible = (tokens) => tokens.filter((token) => token.t).map((token) => token.t);
    const base = visible(this.columns[0].answer.tokens.slice(before[0]));
    this.columns.slice(1).forEach((column, index) => {
      for (const key of base) column.answer.common.addA(key);
      for (const key of visible(column.answer.tokens.slice(before[index + 1]))) column.answer.common.addB(key);
    });
  }

  // ---- what is shown ----

  get steps() {
    return Math.max(0, ...this.columns.map((column) => column.answer.tokens.length));
  }

  go(step) {
    this.step = step >= this.steps ? null : step;
    this.refresh();
  }

  refresh() {
    if (!this.columns.length) return;
    const marks = minilora.marks;
    this.box.dataset.diff = marks.diff && !this.now.blind ? "on" : "off";
    this.box.dataset.experts = marks.experts && !this.now.blind ? "on" : "off";
    const shown = this.step === null ? Infinity : this.step;
    const base = this.columns[0].answer;
    const keepers = new Array(base.tokens.length).fill(0);
    const forks = [];
    this.columns.forEach((column, index) => {
      const answer = column.answer;
      if (index === 0 || this.now.blind) {
        column.show(shown, null, null);
        return;
      }
      const { inA, inB } = this.shared(answer, base, shown);
      for (const at of inA) keepers[at]++;
      const fork = answer.fork(base);
      column.show(shown, inB, fork);
      if (fork !== null && fork < shown) forks.push({ ...answer.about, at: fork, column: index });
    });
    const steps = this.steps;
    const some = steps > 0;
    const running = this.columns.some(({ now }) => ["idle", "waiting", "writing"].includes(now.state));
    this.talk.parentElement.hidden = running || !some || this.now.blind || Boolean(this.now.replay);
    this.box.dataset.some = some ? "yes" : "no";
    const kept = keepers.slice(0, Math.min(shown, base.tokens.length));
    this.timeline.paint(steps, Math.min(shown, steps), kept, this.now.blind ? 0 : this.columns.length - 1, forks);
    this.paintExperts(shown);
    this.paintInspector(shown);
  }

  // Positions of the tokens that base and answer share, within the shown part of both.
  shared(answer, base, shown) {
    const places = (tokens) => tokens.flatMap((token, at) => (token.t && at < shown ? [at] : []));
    const ofBase = places(base.tokens);
    const ours = places(answer.tokens);
    const { inA, inB } = answer.common.kept(ofBase.length, ours.length);
    const silent = answer.tokens.flatMap((token, at) => (token.t ? [] : [at]));
    return { inA: new Set([...inA].map((i) => ofBase[i])), inB: new Set([...silent, ...[...inB].map((j) => ours[j])]) };
  }

  paintExperts(shown) {
    const mixtures = this.columns.flatMap(({ answer }, column) =>
      answer.about.experts && !Number.isInteger(answer.about.solo) ? [{ column, answer, solos: this.solos(answer.about) }] : [],
    );
    const open = mixtures.some(({ column }) => column === this.open) ? this.open : null;
    this.experts.paint(this.now.blind ? [] : mixtures, shown, open);
    this.box.querySelector(".ml-letters").textContent = lettersWords(mixtures.map(({ answer }) => answer));
  }

  // The experts of an adapter that have a column of their own.
  solos({ adapter }) {
    return this.columns.flatMap(({ answer: { about } }) =>
      about.adapter === adapter && Number.isInteger(about.solo) ? [about.solo] : [],
    );
  }

  paintInspector(shown) {
    if (this.chosen === null || this.chosen.at >= shown) {
      if (this.chosen !== null) this.unchoose();
      return;
    }
    const { answer } = this.columns[this.chosen.column];
    const base = this.columns[0].answer;
    const fork = answer.fork(base);
    const same = !this.now.blind && this.chosen.at < base.tokens.length && (fork === null || this.chosen.at <= fork);
    this.inspector.paint(answer, base, this.chosen.at, same, this.columns[this.chosen.column].spans[this.chosen.at]);
  }

  // ---- what a visitor does ----

  choose(column, at) {
    this.columns.forEach((one, index) => one.mark(index === column ? at : null));
    this.chosen = { column, at };
    this.refresh();
  }

  act(column, name) {
    if (name !== "tune") this.trigger(name, { column });
    else {
      const { answer, now } = this.columns[column];
      const again = !this.now.replay && now.state !== "idle";
      this.tuner.open(column, answer.about.name, now.sampling || {}, this.now.sampling, again);
    }
  }

  unchoose() {
    this.columns.forEach((one) => one.mark(null));
    this.chosen = null;
    this.inspector.clear();
  }

  chooseFork(column) {
    const at = this.columns[column].answer.fork(this.columns[0].answer);
    if (at !== null) this.choose(column, at);
  }

  solo(column, expert) {
    const { about } = this.columns[column].answer;
    const current = this.solos(about);
    const experts = current.includes(expert) ? current.filter((one) => one !== expert) : [...current, expert];
    this.trigger("solo", { adapter: about.adapter, experts, prompt: this.now.prompt });
  }

  share() {
    const columns = this.columns.map(({ answer, now }, index) => ({
      about: answer.about,
      now,
      tokens: answer.tokens,
      kept: minilora.marks.diff && index ? this.shared(answer, this.columns[0].answer, Infinity).inB : null,
      experts: this.box.dataset.experts === "on",
    }));
    const words = (name) => document.querySelector(name)?.textContent || "";
    const picture = new Picture(this.box);
    const common = this.now.sampling ? `Settings: ${settingWords(this.now.sampling)}` : "";
    picture.draw(words(".ml-head h1"), this.now.prompt, [words(".ml-count"), common], columns);
    picture.save("comparison.png");
  }

  keys() {
    document.addEventListener("keydown", (event) => {
      if (event.isComposing || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "Escape") {
        const stop = document.querySelector("#ml-stop");
        if (stop && !stop.disabled) stop.click();
        else if (this.chosen) this.unchoose();
        return;
      }
      if (event.target.closest?.("input:not([type=range]):not([type=checkbox]), textarea, select, [contenteditable]")) return;
      const key = event.key.toLowerCase();
      if (key === "d") minilora.marks.toggle("diff");
      if (key === "e") minilora.marks.toggle("experts");
      if (/^[1-9]$/.test(key)) document.dispatchEvent(new CustomEvent("ml:vote", { detail: Number(key) }));
    });
  }
}

// The active highlights in the answers, toggled by the buttons above the columns and the keys D and E.
const minilora = {
  marks: {
    diff: true,
    experts: true,
    listeners: [],
    listen(listener) {
      this.listeners.push(listener);
      listener();
    },
    toggle(name) {
      this[name] = !this[name];
      for (const listener of this.listeners) listener();
    },
  },
  stage: (element, trigger) => new Stage(element, trigger),
  letterOf,
  // Ask the adapter picker to "use", "remove" or "add" an adapter.
  adapter: (act, adapter = null) => document.dispatchEvent(new CustomEvent("ml:adapter", { detail: { act, adapter } })),
  async copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // The browser denies access to the clipboard: copy what is selected.
      const field = document.body.appendChild(Object.assign(document.createElement("textarea"), { value: text }));
      field.select();
      document.execCommand("copy");
      field.remove();
    }
  },
  // Save a Blob as a download.
  save(name, blob) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  },
};
window.minilora = minilora;
