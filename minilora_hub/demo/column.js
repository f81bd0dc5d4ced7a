// One column: text only ever appends, and only ever as text. Runs once for each column when the page loads.
const card = element.querySelector(".ml-card");
const find = (name) => card.querySelector(".ml-" + name);
const words = {
  idle: "ready", waiting: "waiting", writing: "writing", eos: "finished",
  length: "length limit", stop: "stop text", stopped: "stopped", error: "failed",
};

function introduce() {
  const about = props.column;
  if (!about || !about.kind) return;
  card.dataset.kind = about.kind;
  card.setAttribute("aria-label", about.name + ", " + about.kind);
  find("badge").textContent = about.badge;
  find("name").textContent = about.name;
  find("facts").textContent = about.facts;
}

const text = find("text").appendChild(document.createTextNode(""));
const number = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
let run = 0;

function paint() {
  const now = props.value;
  if (!now || !now.state) return;
  if (now.run !== run) {
    run = now.run;
    text.data = "";
  }
  if (now.text.length > text.length) text.appendData(now.text.slice(text.length));
  card.dataset.state = now.state;
  find("state").textContent = words[now.state] || now.state;
  find("error").hidden = !now.error;
  find("error").textContent = now.error || "";
  find("rate").textContent = number(now.rate, now.rate >= 100 ? 0 : 1);
  find("first").textContent = now.first === null ? "–" : number(now.first, 2) + " s";
  find("step").textContent = number(now.step, now.step >= 100 ? 0 : 1);
  find("tokens").textContent = now.tokens || "–";
}

watch("column", introduce);
watch("value", paint);
introduce();
paint();
