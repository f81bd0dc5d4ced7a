// On a phone one column fills the screen; tabs and swipes switch between columns.

class Tabs {
  // Calls shown(index) when another column fills the screen.
  constructor(box, row, shown) {
    this.box = box;
    this.shown = shown;
    this.row = row;
    row.addEventListener("scroll", () => this.follow(), { passive: true });
  }

  build(abouts, cards) {
    this.cards = cards;
    this.tabs = abouts.map((about, index) => {
      const tab = make("button", "ml-tab", about.solo === null || about.solo === undefined ? about.kind : about.name);
      tab.type = "button";
      tab.dataset.kind = about.kind;
      tab.setAttribute("aria-label", `Show ${about.name}`);
      tab.addEventListener("click", () => this.open(index));
      return tab;
    });
    this.box.replaceChildren(...this.tabs);
    this.follow();
  }

  open(index) {
    const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "instant" : "smooth";
    this.row.scrollTo({ left: this.cards[index].offsetLeft - this.cards[0].offsetLeft, behavior });
  }

  follow() {
    const left = this.row.scrollLeft + this.row.clientWidth / 2;
    const start = this.cards[0]?.offsetLeft || 0;
    const open = this.cards.findIndex((card) => left < card.offsetLeft - start + card.offsetWidth);
    if (this.tabs[open]?.getAttribute("aria-current") === "true") return;
    this.tabs.forEach((tab, index) => tab.setAttribute("aria-current", String(index === open)));
    this.shown(open);
  }
}
