// Which Load STAR feeds a node's `model` input, through reroutes and the walls of subgraphs. Nothing of the DOM.

const LOADER = "StarLoad";
const SOCKET = "STAR_MODEL";
const SUBGRAPH_INPUT = -10; // litegraph's ids of the two boundary nodes inside a subgraph
const FURTHEST = 100; // a loop in a broken graph must end

/** The Load STAR node upstream of a node's input, or null. */
export function loaderOf(node, inputName, rootGraph) {
  const slot = node.inputs?.findIndex((input) => input.name === inputName) ?? -1;
  return slot < 0 ? null : upstream(node, slot, rootGraph, FURTHEST);
}

/** What a Load STAR node has chosen: its widgets by name. */
export function choiceOf(loader) {
  const value = (name) => loader.widgets?.find((widget) => widget.name === name)?.value ?? "";
  return { checkpoint: value("checkpoint"), preset: value("preset") };
}

function upstream(node, slot, rootGraph, steps) {
  const graph = node.graph;
  const id = node.inputs?.[slot]?.link;
  if (steps <= 0 || !graph || id === null || id === undefined) return null;
  const link = graph.getLink?.(id) ?? graph.links?.get?.(id) ?? graph.links?.[id];
  if (!link) return null;
  if (Number(link.origin_id) === SUBGRAPH_INPUT) return outside(graph, link.origin_slot, rootGraph, steps);
  return through(graph.getNodeById(link.origin_id), link.origin_slot, rootGraph, steps);
}

// The origin of a link: the loader itself, a subgraph to look into, or a node that hands the model on.
function through(origin, slot, rootGraph, steps) {
  if (!origin || origin.type === LOADER) return origin ?? null;
  if (origin.subgraph) {
    const inner = origin.resolveSubgraphOutputLink?.(slot)?.outputNode;
    const innerSlot = origin.resolveSubgraphOutputLink?.(slot)?.link?.origin_slot ?? 0;
    return inner ? through(inner, innerSlot, rootGraph, steps - 1) : null;
  }
  const carriers = (origin.inputs ?? []).flatMap((input, index) =>
    input.link != null && (input.type === SOCKET || input.type === "*") ? [index] : [],
  );
  for (const index of carriers) {
    const found = upstream(origin, index, rootGraph, steps - 1);
    if (found) return found;
  }
  return null;
}

// From inside a subgraph to what feeds this input of it; with several copies of it, the first that leads anywhere.
function outside(subgraph, slot, rootGraph, steps) {
  const graphs = [rootGraph, ...(rootGraph.subgraphs?.values?.() ?? [])];
  for (const graph of graphs) {
    for (const host of graph.nodes ?? graph._nodes ?? []) {
      if (host.subgraph !== subgraph && host.subgraph?.id !== subgraph.id) continue;
      const found = upstream(host, slot, rootGraph, steps - 1);
      if (found) return found;
    }
  }
  return null;
}
