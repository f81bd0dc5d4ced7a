// The columns and the panels below them; comparison.js does the work. Runs once when the page loads.
const stage = window.minilora.stage(element, (name, data) => name === "solo" && trigger("solo", data));
const paint = () => stage.paint(props.value);
watch("value", paint);
paint();
