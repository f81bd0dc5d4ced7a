// The columns: built when what they describe changes; text only ever appends, and only ever as text.
const CARD = `
  <div class="ml-band" aria-hidden="true"></div>
  <header>
    <span class="ml-badge" aria-hidden="true"></span>
    <h2 class="ml-name"></h2>
    <span class="ml-state"></span>
  </header>
  <p class="ml-facts"></p>
  <div class="ml-answer" dir="auto"><span class="ml-text"></span><span class="ml-caret" aria-hidden="true"></span></div>
  <p class="ml-error" hidden></p>
  <dl class="ml-numbers">
    <div><dt>tokens/s</dt><dd class="ml-rate">–</dd></div>
    <div><dt>first token</dt><dd class="ml-first">–</dd></div>
    <div title="Computing time of one step, in which every column gets its next token."><dt>ms/step</dt><dd class="ml-step">–</dd></div>
    <div><dt>tokens</dt><dd class="ml-tokens">–</dd></div>
  </dl>`;
const STATES = {
  idle: "ready", waiting: "waiting", writing: "writing", eos: "finished",
  length: "length limit", stop: "stop text", stopped: "stopped", error: "failed",
};
const row = element.querySelector(".ml-columns");
const number = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
let cards = [];
let described = "";
let run = null;

function build(about) {
  const card = document.createElement("article");
  card.className = "ml-card";
  card.innerHTML = CARD;
  const find = (name) => card.querySelector(".ml-" + name);
  card.dataset.kind = about.kind;
  card.setAttribute("aria-label", about.name + ", " + about.kind);
  find("badge").textContent = about.badge;
  find("name").textContent = about.name;
  find("facts").textContent = about.facts;
  return { card, find, text: find("text").appendChild(document.createTextNode("")) };
}

function paintColumn({ card, find, text }, now) {
  if (now.text.length > text.length) text.appendData(now.text.slice(text.length));
  card.dataset.state = now.state;
  find("state").textContent = STATES[now.state] || now.state;
  find("error").hidden = !now.error;
  find("error").textContent = now.error || "";
  find("rate").textContent = number(now.rate, now.rate >= 100 ? 0 : 1);
  find("first").textContent = now.first === null ? "–" : number(now.first, 2) + " s";
  find("step").textContent = number(now.step, now.step >= 100 ? 0 : 1);
  find("tokens").textContent = now.tokens || "–";
}

function paint() {
  const now = props.value;
  if (!now || !now.columns) return;
  const about = JSON.stringify(now.columns.map((column) => column.about));
  if (about !== described) {
    described = about;
    cards = now.columns.map((column) => build(column.about));
    row.replaceChildren(...cards.map((one) => one.card));
  } else if (now.run !== run) {
    for (const one of cards) one.text.data = "";
  }
  run = now.run;
  now.columns.forEach((column, index) => paintColumn(cards[index], column));
}

watch("value", paint);
paint();
