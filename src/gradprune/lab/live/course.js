// What happens to four workers from their first step to their last: they train, prune at some moment, and train on.
import {
  averageWhenDue,
  branchCrew,
  createCrew,
  crewStep,
  heads,
  pruneCrew,
  WAYS,
  zeros,
} from "./crew.js";
import { keptCount } from "./rank.js";
import { countAll } from "./reading.js";

const ABOUT = 160; // steps of training, and as many after it: whole periods of them

/**
 * Returns a course at its start. `made` is what `createCrew` takes; `read(net)` gives `{ accuracy }`. `reads` has the
 * step and an accuracy for each network that is one's own; `zeros`, the step and the share of zeros, before and after each
 * average; `alive`, how many pruned weights are alive after the latest average.
 */
export function createCourse(made, read) {
  const averaged = WAYS[made.way].averaged;
  const length = averaged ? made.period * Math.round(ABOUT / made.period) : ABOUT;
  const trained = createCrew({ ...made, seed: 0 });
  const course = { averaged, length, read, trained, branch: null, reads: [], zeros: [], alive: 0 };
  note(course);
  return course;
}

export const crewOf = ({ branch, trained }) => branch ?? trained;
export const isPruned = (course) => crewOf(course).workers[0].masks !== null;
export const isTrained = ({ trained, length }) => trained.steps >= length;
export const isDone = ({ branch, length }) => branch !== null && branch.steps >= 2 * length;

/** Goes back to the end of the training, or to where it is, with nothing pruned. */
export function unprune(course) {
  const reads = course.reads.filter(({ steps }) => steps <= course.trained.steps);
  Object.assign(course, { branch: null, reads, zeros: [], alive: 0 });
}

/** Goes on from the end of the training, with a copy: how is `{ late, decides, sparsity }`. */
export function branchOff(course) {
  course.branch ??= branchCrew(course.trained, 1);
}

/** Takes up to `count` steps of the training, or of what follows; returns whether there are more. */
export function advance(course, count, how) {
  const ended = () => (course.branch ? isDone(course) : isTrained(course));
  for (let at = 0; at < count && !ended(); at++) step(course, how);
  note(course);
  return !ended();
}

/** The step at which masks are chosen: so many after an average, where there are averages. */
export const momentOf = ({ averaged, length }, { late }) => length + (averaged ? late : 0);

function step(course, how) {
  const crew = crewOf(course);
  const { averaged, branch } = course;
  if (branch && !isPruned(course) && branch.steps === momentOf(course, how)) {
    pruneCrew(branch, how.sparsity, how.decides);
    if (averaged) noteZeros(course);
  }
  crewStep(crew);
  if (!isPruned(course)) {
    averageWhenDue(crew);
    return;
  }
  const found = noteZeros(course);
  const total = countAll(crew.workers[0].net.weights);
  const asked = total - keptCount(total, how.sparsity);
  if (averageWhenDue(crew)) course.alive = asked - noteZeros(course);
  else if (!averaged) course.alive = asked - found;
}

function note(course) {
  const crew = crewOf(course);
  if (course.reads.at(-1)?.steps === crew.steps) return;
  const accuracies = [];
  for (const { net } of heads(crew)) {
    const known = crew.agree && accuracies.length > 0;
    accuracies.push(known ? accuracies[0] : course.read(net).accuracy);
  }
  course.reads.push({ steps: crew.steps, accuracies });
}

function noteZeros(course) {
  const found = zeros(crewOf(course));
  course.zeros.push([crewOf(course).steps, found]);
  return found;
}
