// One column: a card with an answer, to which one element per token is appended.

const CARD = `
  <div class="ml-band" aria-hidden="true"></div>
  <header>
    <span class="ml-badge" aria-hidden="true"></span>
    <span class="ml-state"></span>
    <span class="ml-verdict" hidden></span>
  </header>
  <div class="ml-title">
    <h2 class="ml-name"></h2>
    <button type="button" class="ml-do ml-use">Get</button>
    <button type="button" class="ml-do ml-remove">×</button>
  </div>
  <p class="ml-facts"></p>
  <div class="ml-purpose"><p></p><p></p><p class="ml-own" hidden></p></div>
  <div class="ml-answer" dir="auto" tabindex="0" role="group"><div class="ml-before"></div><div class="ml-rendered"></div><span class="ml-text"></span><span class="ml-caret" aria-hidden="true"></span><p class="ml-error" hidden></p></div>
  <div class="ml-foot">
    <button type="button" class="ml-fork" title="The first token that differs from the base's answer" hidden></button>
    <button type="button" class="ml-act ml-tune" title="Sampling of this column"></button>
    <button type="button" class="ml-act ml-halt" title="Stop this answer">■</button>
    <button type="button" class="ml-act ml-again" title="Answer again, this column only">⟳</button>
    <button type="button" class="ml-act ml-copy-answer" title="Copy this answer"></button>
  </div>
  <dl class="ml-numbers">
    <div><dt>tokens/s</dt><dd class="ml-rate">–</dd></div>
    <div><dt>first token</dt><dd class="ml-first">–</dd></div>
    <div><dt>tokens</dt><dd class="ml-tokens">–</dd></div>
  </dl>`;
const SCORE = ". In brackets: the 95% interval; adapters whose intervals overlap may be equally good.";
const STATES = {
  idle: "ready", waiting: "waiting", writing: "writing", eos: "finished",
  length: "length limit", stop: "stop text", stopped: "stopped", error: "failed",
};

class Column {
  // choose(token index) is called when a visitor picks a token, act(name) when they stop, repeat or tune this column alone.
  constructor(about, choose, act) {
    this.answer = new Answer(about);
    this.card = make("article", "ml-card");
    this.card.innerHTML = CARD;
    this.card.dataset.kind = about.kind;
    this.card.setAttribute("aria-label", about.name + ", " + about.kind);
    this.find("badge").textContent = about.letter ? `${about.letter} ${about.badge}` : about.badge;
    this.find("name").textContent = about.name;
    this.find("facts").textContent = about.facts;
    const lines = [about.purpose || (about.kind === "base" ? "The model itself, without an adapter." : ""), about.score || ""];
    this.card.querySelectorAll(".ml-purpose p:not(.ml-own)").forEach((line, index) => Object.assign(line, { textContent: lines[index], title: lines[index] + (index && / \(\d/.test(lines[index]) ? SCORE : "") }));
    this.find("answer").setAttribute("aria-label", `Answer of ${about.name}. Use the arrow keys to move between tokens.`);
    for (const [act, words] of [["use", "Get"], ["remove", "Remove"]]) {
      const button = this.find(act);
      button.hidden = !about.adapter || Number.isInteger(about.solo) || about.kind === "auto";
      button.setAttribute("aria-label", `${words} ${about.name}`);
      button.addEventListener("click", () => minilora.adapter(act, about.adapter));
    }
    for (const [name, words, run] of [
      ["halt", "Stop", () => act("halt")],
      ["again", "Answer again:", () => act("again")],
      ["tune", "Sampling of", () => act("tune")],
      ["copy-answer", "Copy the answer of", () => this.copy()],
    ]) {
      this.find(name).setAttribute("aria-label", `${words} ${about.name}`);
      this.find(name).addEventListener("click", run);
    }
    this.spans = [];
    this.at = null;
    this.choose = choose;
    this.find("text").addEventListener("click", (event) => {
      const index = this.spans.indexOf(event.target.closest(".ml-token"));
      if (index >= 0) choose(index);
    });
    this.find("fork").addEventListener("click", () => choose(this.fork));
    this.find("answer").addEventListener("keydown", (event) => this.walk(event));
  }

  find(name) {
    return this.card.querySelector(".ml-" + name);
  }

  async copy() {
    await minilora.copy(this.answer.tokens.map((token) => token.t).join(""));
    this.find("copy-answer").textContent = "✓";
    setTimeout(() => { this.find("copy-answer").textContent = ""; }, 1500);
  }

  // The earlier turns, and the finished answer as HTML, which the server has rendered from Markdown and sanitised.
  paintTexts({ before, html }) {
    const turns = before || [];
    if (this.find("before").children.length !== turns.length) {
      this.find("before").replaceChildren(...turns.map(([role, text]) => make("p", "ml-turn-" + role, text)));
    }
    if (html && this.html !== html) this.find("rendered").innerHTML = this.html = html;
    this.card.dataset.html = html ? "yes" : "no";
  }

  walk(event) {
    const last = this.spans.findLastIndex((span) => !span.hidden);
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey || last < 0) return;
    event.preventDefault();
    const to = this.at === null ? 0 : this.at + steps[event.key];
    const index = Math.max(0, Math.min(last, to));
    this.choose(index);
    this.spans[index].focus();
  }

  // Mark the chosen token, or none.
  mark(index) {
    if (this.at !== null) this.spans[this.at]?.classList.remove("ml-chosen");
    this.at = index;
    if (index !== null) this.spans[index].classList.add("ml-chosen");
  }

  paint(now) {
    if (this.answer.take(now.log)) this.grow();
    this.now = now;
    this.paintTexts(now);
    if (now.state === "eos") this.spans.at(-1)?.classList.toggle("ml-end", !this.answer.tokens.at(-1).t);
    if (now.route) {
      const { adapter, similarity, runner_up: second } = now.route;
      const why = `Answered by ${adapter}: similarity ${similarity.toFixed(3)}${second ? `, then ${second.adapter} with ${second.similarity.toFixed(3)}` : ""}.`;
      Object.assign(this.card.querySelector(".ml-purpose p"), { textContent: why, title: why });
    }
    const own = settingWords(now.sampling || {});
    this.find("own").hidden = !own;
    this.find("own").textContent = own && `own settings: ${own}`;
    this.find("tune").setAttribute("aria-pressed", String(Boolean(own)));
    this.find("error").hidden = !now.error;
    this.find("error").textContent = now.error || "";
    this.find("verdict").hidden = typeof now.right !== "boolean";
    this.find("verdict").textContent = now.right ? "✓ right" : "✗ wrong";
    this.find("verdict").title = "This one answer; the score below is over many test items";
    this.find("verdict").dataset.right = now.right ? "yes" : "no";
    this.find("rate").textContent = digits(now.rate, now.rate >= 100 ? 0 : 1);
    this.find("first").textContent = now.first === null ? "–" : digits(now.first, 2) + " s";
    this.find("tokens").textContent = now.tokens || "–";
  }

  grow() {
    const fresh = document.createDocumentFragment();
    for (const token of this.answer.tokens.slice(this.spans.length)) {
      const span = make("span", "ml-token", token.t);
      span.tabIndex = -1;
      if (token.expert !== null) {
        span.dataset.letter = letterOf(token.expert);
        span.style.setProperty("--e", hueOf(token.expert));
      }
      this.spans.push(span);
      fresh.append(span);
    }
    this.find("text").append(fresh);
  }

  // Show the first `count` tokens; `kept` are those that the base's answer shares, `fork` is the first that differs.
  show(count, kept, fork) {
    this.spans.forEach((span, index) => {
      const hide = index >= count;
      if (span.hidden !== hide) span.hidden = hide;
      const differs = kept !== null && !kept.has(index);
      if (("differs" in span.dataset) !== differs) {
        if (differs) span.dataset.differs = "";
        else delete span.dataset.differs;
      }
      if (("fork" in span.dataset) !== (index === fork)) {
        if (index === fork) span.dataset.fork = "";
        else delete span.dataset.fork;
      }
    });
    this.fork = fork;
    const whole = count >= this.spans.length;
    this.card.dataset.state = whole || this.now.state === "error" ? this.now.state : "replaying";
    this.find("state").textContent = whole ? STATES[this.now.state] || this.now.state : "";
    this.find("verdict").classList.toggle("ml-unseen", !whole);
    // A running answer is followed to its end, unless the visitor has scrolled up.
    const box = this.find("answer");
    if (this.follows === undefined || box.scrollTop >= this.follows - 40) box.scrollTop = box.scrollHeight;
    this.follows = box.scrollHeight - box.clientHeight;
    const button = this.find("fork");
    button.hidden = fork === null || fork >= count;
    if (!button.hidden) button.textContent = `≠ base at token ${fork + 1}`;
  }
}
