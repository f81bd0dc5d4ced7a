// The dialog in which a visitor gives one column sampling settings of its own.

class Tuner {
  // Calls send(column, own settings, whether to answer again at once).
  constructor(dialog, send) {
    this.dialog = dialog;
    this.fields = [...dialog.querySelectorAll("input")];
    dialog.querySelector("form").addEventListener("submit", ({ submitter }) => {
      const set = submitter?.value !== "reset";
      if (submitter?.value !== "cancel") send(this.column, set ? this.own() : {}, this.again);
    });
  }

  // column: its place; own: its settings so far; common: those of the others; again: whether its answer is repeated.
  open(column, name, own, common, again) {
    Object.assign(this, { column, again });
    this.dialog.querySelector("h2").textContent = `Sampling of ${name} alone`;
    this.dialog.querySelector(".ml-strong").textContent = again ? "Answer with these" : "Use from the next run on";
    for (const field of this.fields) {
      field.value = own[field.name] ?? "";
      field.placeholder = common?.[field.name] ?? "common";
    }
    this.dialog.showModal();
  }

  own() {
    const filled = this.fields.filter((field) => field.value !== "");
    return Object.fromEntries(filled.map((field) => [field.name, field.valueAsNumber]));
  }
}
