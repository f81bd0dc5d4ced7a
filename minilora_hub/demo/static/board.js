// The Board: tables with bars. Names of adapters are untrusted, so they are inserted as text only.
const box = element.querySelector(".ml-board");
const find = (name) => box.querySelector(name);
const percent = (value) => Math.round(100 * value) + "%";

function make(tag, name, ...content) {
  const one = document.createElement(tag);
  if (name) one.className = name;
  one.append(...content);
  return one;
}

function bar(rate, chance) {
  const track = make("div", "ml-rate-track");
  track.setAttribute("role", "img");
  track.setAttribute("aria-label", `${percent(rate.value)}, from ${percent(rate.low)} to ${percent(rate.high)}`);
  const place = (name, from, to) => {
    const part = make("span", name);
    part.style.left = 100 * from + "%";
    part.style.width = 100 * (to - from) + "%";
    track.append(part);
  };
  place("ml-rate-bar", 0, rate.value);
  place("ml-rate-span", rate.low, rate.high);
  if (chance !== null && chance !== undefined) place("ml-rate-chance", chance, chance);
  return track;
}

function model(name, kind, weights) {
  const head = make("th", "ml-model", make("span", "ml-model-name", name));
  head.scope = "row";
  head.dataset.kind = kind;
  head.append(make("span", "ml-model-kind", weights ? `${kind} · ${weights}` : kind));
  return head;
}

function shareCells(rate, chance) {
  if (!rate) return [make("td", "", "–"), make("td", "ml-wide", "no votes yet")];
  const words = make("span", "ml-rate-words", `${percent(rate.low)} to ${percent(rate.high)}`);
  return [make("td", "ml-share", percent(rate.value)), make("td", "ml-wide", bar(rate, chance), words)];
}

function score(one) {
  const cell = make("td", "ml-score");
  if (!one) cell.append("–");
  else {
    const shown = (value) => (value > 0 ? "+" : value < -0.5 ? "−" : "") + Math.abs(Math.round(value));
    cell.append(shown(one.value), make("span", "ml-rate-words", `${shown(one.low)} to ${shown(one.high)}`));
  }
  return cell;
}

const select = find(".ml-board-group select");
select.addEventListener("change", () => paintGroup(props.value.groups[select.selectedIndex]));

function paint() {
  const now = props.value;
  if (!now || !now.phase) return;
  box.dataset.phase = now.phase;
  find(".ml-board-words").textContent = now.words || "";
  find(".ml-board-empty").hidden = now.phase !== "empty";
  find(".ml-board-votes").hidden = now.phase !== "votes";
  if (now.phase !== "votes") return;
  find(".ml-board-needed").textContent = now.needed;
  select.replaceChildren(...now.groups.map((one) => make("option", "", `${one.title} (${one.votes})`)));
  select.closest("label").hidden = now.groups.length < 2;
  paintGroup(now.groups[0]);
}

function paintGroup(now) {
  find(".ml-board-rows").replaceChildren(...now.models.map((one) => {
    const counts = [one.wins, one.losses, one.ties, one.all_bad, one.shown].map((count) => make("td", "ml-count-cell", String(count)));
    const line = make("tr", "", model(one.name, one.kind, one.weights.replace("sha256:", "").slice(0, 8)), score(one.score), ...shareCells(one.share, one.chance), ...counts);
    line.dataset.kind = one.kind;
    return line;
  }));
  find(".ml-board-pairs").replaceChildren(...now.pairs.map((one) => {
    const { first, second, share } = one;
    const head = model(`${first.name} over ${second.name}`, `${first.kind} over ${second.kind}`);
    const line = make("tr", "", head, ...shareCells(share, 0.5), make("td", "ml-count-cell", String(share.n)));
    line.dataset.kind = first.kind;
    return line;
  }));
  find(".ml-board-pairs").closest(".ml-board-scroll").hidden = now.pairs.length === 0;
}

watch("value", paint);
paint();
